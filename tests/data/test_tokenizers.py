"""Laws of tokenizers: what is encoded comes back, and what cannot be is named."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from mambakit.data import (
    ByteTokenizer,
    CharacterTokenizer,
    JsonTokenizer,
    load_tokenizer,
    save_tokenizer,
)

TEXT = "To be, or not to be — né 你好 🐍\n\tquestion\n" * 3


def trained(decoder="ByteLevel"):
    """A small BPE tokenizer, made by the library itself from a few lines of text."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    if decoder == "ByteLevel":
        tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return tokenizer.to_str()


def every():
    return [ByteTokenizer(), CharacterTokenizer(TEXT), JsonTokenizer(trained())]


@pytest.mark.parametrize("tokenizer", every(), ids=lambda t: t.name)
def test_text_comes_back(tokenizer):
    ids = tokenizer.encode(TEXT)
    assert ids.dtype == np.int64
    assert ids.min() >= 0
    assert ids.max() < tokenizer.vocab_size
    assert tokenizer.decode(ids.tolist()) == TEXT
    assert tokenizer.decode_bytes(ids.tolist()) == TEXT.encode()


@pytest.mark.parametrize("tokenizer", every(), ids=lambda t: t.name)
@pytest.mark.parametrize("kind", [np.asarray, np.uint16, torch.as_tensor])
def test_text_comes_back_from_arrays_as_well(tokenizer, kind):
    ids = kind(tokenizer.encode(TEXT))
    assert tokenizer.decode(ids) == TEXT
    assert tokenizer.decode_bytes(ids) == TEXT.encode()


@pytest.mark.parametrize("tokenizer", every(), ids=lambda t: t.name)
def test_bytes_and_text_are_the_same_text(tokenizer):
    assert tokenizer.encode(TEXT.encode()).tolist() == tokenizer.encode(TEXT).tolist()


@pytest.mark.parametrize("tokenizer", every(), ids=lambda t: t.name)
def test_single_tokens_join_to_the_whole(tokenizer):
    ids = tokenizer.encode(TEXT).tolist()
    assert b"".join(tokenizer.decode_bytes([i]) for i in ids) == TEXT.encode()


@pytest.mark.parametrize("tokenizer", every(), ids=lambda t: t.name)
def test_saved_and_loaded_is_the_same(tokenizer, tmp_path):
    save_tokenizer(tokenizer, tmp_path / "tokenizer.json")
    loaded = load_tokenizer(str(tmp_path / "tokenizer.json"))
    assert type(loaded) is type(tokenizer)
    assert loaded.to_json() == tokenizer.to_json()
    assert loaded.encode(TEXT).tolist() == tokenizer.encode(TEXT).tolist()


@settings(deadline=None)
@given(st.binary())
def test_every_byte_string_is_text_for_the_byte_tokenizer(data):
    tokenizer = ByteTokenizer()
    assert tokenizer.decode_bytes(tokenizer.encode(data).tolist()) == data


@settings(deadline=None)
@given(st.text(min_size=1))
def test_characters_come_back_whatever_they_are(text):
    tokenizer = CharacterTokenizer(text)
    assert tokenizer.decode(tokenizer.encode(text).tolist()) == text
    assert tokenizer.vocab_size == len(set(text))


def test_broken_utf8_is_shown_as_replacement():
    assert ByteTokenizer().decode([0x61, 0xC3]) == "a\ufffd"


def test_json_tokenizer_without_byte_decoder_gives_its_own_text():
    tokenizer = JsonTokenizer(trained(decoder=None))
    ids = tokenizer.encode("be").tolist()
    assert tokenizer.decode_bytes(ids) == tokenizer.decode(ids).encode()


def test_special_tokens_are_text_too():
    tokenizer = JsonTokenizer(trained())
    ids = tokenizer.encode("be<|end|>").tolist()
    assert ids[-1] == 0
    assert tokenizer.decode_bytes(ids) == b"be<|end|>"


def test_a_character_outside_the_alphabet_is_named():
    with pytest.raises(ValueError, match=r"got 'z' at position 2"):
        CharacterTokenizer("ab").encode("abz")


def test_bytes_that_are_not_utf8_are_named():
    with pytest.raises(ValueError, match=r"must be UTF-8, got the byte 0xff at offset 3"):
        CharacterTokenizer("abc").encode(b"abc\xff")


def test_an_empty_alphabet_is_refused():
    with pytest.raises(ValueError, match="characters must not be empty"):
        load_tokenizer("character", [])


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("not json", "must be JSON"),
        (json.dumps({"model": {"type": "nonsense"}}), "must be a tokenizers JSON file"),
        (json.dumps({"kind": "character"}), "must be a tokenizers JSON file"),
    ],
)
def test_a_file_that_is_no_tokenizer_is_refused(tmp_path, content, sentence):
    pytest.importorskip("tokenizers")
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=sentence) as refusal:
        load_tokenizer(str(path))
    assert str(path) in str(refusal.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(
        ValueError, match=r"cannot read tokenizer .*missing\.json: No such file"
    ):
        load_tokenizer(str(tmp_path / "missing.json"))


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("char", r"got 'char', and there is no file char; did you mean character\?$"),
        ("bytes", r"; did you mean byte\?$"),
        (
            "/nowhere/chars",
            r"got 'chars', and there is no file /nowhere/chars; did you mean ch",
        ),
        ("words", r"byte, character or a JSON file, got 'words', and there is no file words$"),
    ],
)
def test_an_unknown_kind_is_refused_with_the_nearest_one(spec, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=words):
        load_tokenizer(spec)


def test_a_file_needs_no_suffix(tmp_path):
    save_tokenizer(ByteTokenizer(), tmp_path / "bytes")
    assert load_tokenizer(str(tmp_path / "bytes")).name == "byte"


def test_a_lone_surrogate_is_refused():
    with pytest.raises(ValueError, match="got a lone surrogate at position 1"):
        ByteTokenizer().encode("a\ud800")


@pytest.mark.parametrize("tokenizer", every(), ids=lambda t: t.name)
@pytest.mark.parametrize("token", [-1, 300, 2**40])
@pytest.mark.parametrize("decode", ["decode", "decode_bytes"])
def test_ids_that_there_are_not_are_refused(tokenizer, token, decode):
    sentence = rf"{tokenizer.name} tokenizer: ids must be in \[0, \d+\), got {token}$"
    with pytest.raises(ValueError, match=sentence):
        getattr(tokenizer, decode)([0, token])


def test_a_token_outside_the_byte_alphabet_is_its_own_text():
    definition = json.loads(trained())
    definition["model"]["vocab"]["你"] = 300
    tokenizer = JsonTokenizer(json.dumps(definition))
    ids = [*tokenizer.encode("be").tolist(), 300]
    assert tokenizer.decode(ids) == "be你"
    assert tokenizer.decode_bytes(ids) == "be你".encode()


@pytest.mark.parametrize("definition", ["[" * 100_000, '{"kind": ' + "1" * 5000 + "}"])
def test_json_that_python_cannot_read_is_refused(tmp_path, definition):
    (tmp_path / "tokenizer.json").write_text(definition)
    with pytest.raises(ValueError, match=r"^load_tokenizer: .*tokenizer\.json must be JSON"):
        load_tokenizer(str(tmp_path / "tokenizer.json"))


def test_a_text_that_a_definition_has_no_tokens_for_is_refused(tmp_path):
    pytest.importorskip("tokenizers")
    (tmp_path / "tokenizer.json").write_text(
        '{"version": "1.0", "added_tokens": [], "model": {"type": "WordLevel", '
        '"vocab": {"x": 1}, "unk_token": "zz"}}'
    )
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="the text must be one that it knows"):
        tokenizer.encode("y")
