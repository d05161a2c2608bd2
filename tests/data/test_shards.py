"""Laws of shards: the tokens are those of the text, and a shard is whole or not there."""

import json
import os
import shutil

import numpy as np
import pytest

from mambakit._files import replacing
from mambakit.data import (
    ByteTokenizer,
    CharacterTokenizer,
    find_documents,
    shards,
    split_by_position,
    write_shard,
)


@pytest.fixture
def documents(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "a.txt").write_text("first né")
    (folder / "b.txt").write_text("second")
    return find_documents([str(folder)])


def test_a_shard_is_the_documents_end_to_end(documents, tmp_path):
    shard = write_shard(documents, ByteTokenizer(), tmp_path / "cache")
    text = "first nésecond".encode()
    assert bytes(shard.tokens) == text
    assert shard.tokens.dtype == np.uint8
    assert shard.documents.tolist() == [0, 9, 15]
    assert shard.bytes == len(text)
    assert shard.tokens_per_byte == 1


def test_characters_take_fewer_tokens_than_bytes(documents, tmp_path):
    tokenizer = CharacterTokenizer("first nésecond")
    shard = write_shard(documents, tokenizer, tmp_path / "cache")
    assert tokenizer.decode(shard.tokens.tolist()) == "first nésecond"
    assert shard.tokens_per_byte == 14 / 15


def test_the_separator_follows_every_document(documents, tmp_path):
    shard = write_shard(documents, ByteTokenizer(), tmp_path / "cache", separator="\0")
    assert bytes(shard.tokens) == "first né\0second\0".encode()
    assert shard.documents.tolist() == [0, 10, 17]
    assert shard.bytes == 17


def test_a_wide_vocabulary_takes_wide_tokens(documents, tmp_path):
    class Wide(ByteTokenizer):
        vocab_size = 70_000

        def encode(self, text):
            return super().encode(text) + 69_000

    shard = write_shard(documents, Wide(), tmp_path / "cache")
    assert shard.tokens.dtype == np.uint32
    assert shard.tokens[0] == 69_000 + ord("f")


def test_the_same_text_is_written_once(documents, tmp_path):
    cache = tmp_path / "cache"
    first = write_shard(documents, ByteTokenizer(), cache)
    (folder,) = cache.iterdir()
    before = (folder / "tokens.bin").stat().st_mtime_ns
    assert write_shard(documents, ByteTokenizer(), cache).digest == first.digest
    assert (folder / "tokens.bin").stat().st_mtime_ns == before


def test_other_text_tokenizer_or_separator_is_another_shard(documents, tmp_path):
    cache = tmp_path / "cache"
    digests = {
        write_shard(documents, ByteTokenizer(), cache).digest,
        write_shard(documents, CharacterTokenizer("first nésecond"), cache).digest,
        write_shard(documents, ByteTokenizer(), cache, separator="\n").digest,
        write_shard(documents[:1], ByteTokenizer(), cache).digest,
        write_shard(split_by_position(documents, 0.5, 0).train, ByteTokenizer(), cache).digest,
    }
    assert len(digests) == 5


def test_a_text_that_the_tokenizer_cannot_read_is_named_and_leaves_nothing(documents, tmp_path):
    cache = tmp_path / "cache"
    with pytest.raises(ValueError, match=r"b\.txt: character tokenizer: .* got 'o'"):
        write_shard(documents, CharacterTokenizer("first nésecnd"), cache)
    assert list(cache.iterdir()) == []


def test_a_separator_that_the_tokenizer_cannot_read_is_named(documents, tmp_path):
    with pytest.raises(ValueError, match=r"^data: separator '\|': character tokenizer: .*'\|'"):
        write_shard(
            documents, CharacterTokenizer("first nésecond"), tmp_path / "cache", separator="|"
        )


def test_bytes_that_are_not_utf8_are_named_by_file_and_offset(tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"abc\xff")
    documents = find_documents([str(tmp_path / "bad.txt")])
    with pytest.raises(ValueError, match=r"bad\.txt must be UTF-8.* 0xff at offset 3"):
        write_shard(documents, CharacterTokenizer("abc"), tmp_path / "cache")
    assert len(write_shard(documents, ByteTokenizer(), tmp_path / "cache").tokens) == 4


def test_ids_beyond_the_vocabulary_are_refused(documents, tmp_path):
    class Wrong(ByteTokenizer):
        vocab_size = 100

    with pytest.raises(ValueError, match=r"a\.txt: token ids must be below .* 100, got"):
        write_shard(documents, Wrong(), tmp_path / "cache")


def test_no_text_is_refused(tmp_path):
    with pytest.raises(ValueError, match="must hold at least one token"):
        write_shard([], ByteTokenizer(), tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def cut(data):
    return data[:5]


def one_bit(data):
    return data[:-1] + bytes([data[-1] ^ 1])


@pytest.mark.parametrize("spoil", [cut, one_bit])
@pytest.mark.parametrize("name", ["tokens.bin", "documents.npy"])
def test_a_shard_that_was_changed_is_refused_with_what_to_do(documents, tmp_path, name, spoil):
    """Also one of the same size and time: a shared cache that is copied keeps neither."""
    cache = tmp_path / "cache"
    write_shard(documents, ByteTokenizer(), cache)
    (folder,) = cache.iterdir()
    time = (folder / name).stat().st_mtime_ns
    (folder / name).write_bytes(spoil((folder / name).read_bytes()))
    os.utime(folder / name, ns=(time, time))
    sentence = rf"{name} must be as it was written, got .*: delete the folder"
    with pytest.raises(RuntimeError, match=sentence):
        write_shard(documents, ByteTokenizer(), cache)
    shutil.rmtree(folder)
    assert bytes(write_shard(documents, ByteTokenizer(), cache).tokens).startswith(b"first")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"tokens": 14}, "must describe the tokens beside it"),
        ({"dtype": "<u2"}, "must describe the tokens beside it"),
        ({"dtype": "<f4"}, "must describe the text, got another's"),
        ({"digest": "0"}, "must describe the text, got another's"),
        ({"sha256": None}, "must be whole, got one that is damaged"),
    ],
)
def test_a_record_of_other_tokens_is_refused(documents, tmp_path, change, sentence):
    cache = tmp_path / "cache"
    write_shard(documents, ByteTokenizer(), cache)
    (record,) = cache.glob("*/shard.json")
    record.write_text(json.dumps(json.loads(record.read_text()) | change))
    with pytest.raises(RuntimeError, match=rf"shard\.json {sentence}.*: delete the folder"):
        write_shard(documents, ByteTokenizer(), cache)


def test_a_cache_that_cannot_be_written_is_refused(documents, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RuntimeError, match=r"cannot write .*file"):
        write_shard(documents, ByteTokenizer(), tmp_path / "file" / "cache")


@pytest.mark.parametrize("share", [0, 0.5])
def test_a_damaged_record_is_refused_with_what_to_do(documents, tmp_path, share):
    cache = tmp_path / "cache"
    write_shard(documents, ByteTokenizer(), cache)
    (record,) = cache.glob("*/shard.json")
    data = record.read_bytes()
    record.write_bytes(data[: int(share * len(data))])
    with pytest.raises(
        RuntimeError, match=r"shard\.json must be whole.*: delete the f"
    ) as refusal:
        write_shard(documents, ByteTokenizer(), cache)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", ["shard.json", "tokens.bin", "documents.npy"])
def test_a_missing_file_is_named(documents, tmp_path, name):
    cache = tmp_path / "cache"
    write_shard(documents, ByteTokenizer(), cache)
    (folder,) = cache.iterdir()
    (folder / name).unlink()
    with pytest.raises(RuntimeError, match=rf"{name}.*: delete the folder"):
        write_shard(documents, ByteTokenizer(), cache)


def test_two_runs_that_write_the_same_shard_at_once_both_get_it(
    documents, tmp_path, monkeypatch
):
    cache = tmp_path / "cache"
    other = []

    def overtaken(target):
        if not other:  # as another process that began a moment ago and ends first
            other.append(None)
            other.append(write_shard(documents, ByteTokenizer(), cache))
        return replacing(target)

    monkeypatch.setattr(shards, "replacing", overtaken)
    shard = write_shard(documents, ByteTokenizer(), cache)
    assert shard.digest == other[1].digest
    assert bytes(shard.tokens) == bytes(other[1].tokens)
    assert len(list(cache.iterdir())) == 1
