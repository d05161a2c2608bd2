"""Laws of text as it comes: characters, stop strings, batches."""

import json

import pytest
import torch
from hypothesis import given, settings, strategies as st

from mambakit import MambaConfig, MambaLM
from mambakit.data import ByteTokenizer
from mambakit.data.tokenizers import JsonTokenizer
from mambakit.generation import (
    TextStream,
    complete,
    generate_text,
    stream_text,
    stream_texts,
)

BYTES = ByteTokenizer()


@pytest.fixture
def model(make_model):
    return make_model(256)


def read(stream, tokens):
    pieces = [stream.push(token) for token in tokens]
    return [*pieces, stream.finish()]


@settings(deadline=None)
@given(text=st.text(max_size=20))
def test_text_comes_out_as_it_went_in_character_by_character(text):
    pieces = read(TextStream(BYTES), text.encode())
    assert "".join(pieces) == text
    whole = [piece for piece in pieces if piece]
    if "\ufffd" not in text:
        assert whole == list(text)


@settings(deadline=None)
@given(data=st.binary(max_size=30))
def test_bytes_that_are_no_text_become_replacement_characters(data):
    assert "".join(read(TextStream(BYTES), data)) == data.decode("utf-8", errors="replace")


@settings(deadline=None)
@given(
    text=st.text(alphabet="abé", max_size=30),
    stop=st.lists(st.text(alphabet="abé", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_text_ends_before_the_first_stop_string(text, stop):
    stream = TextStream(BYTES, stop)
    pieces = read(stream, text.encode())
    ends = [text.find(string) for string in stop if string in text]
    # Of two stop strings that overlap, the one that is complete first ends the text.
    first = min(
        (text.find(string) + len(string) for string in stop if string in text),
        default=len(text),
    )
    seen = text[:first]
    expected = min((seen.find(s) for s in stop if s in seen), default=len(text))
    assert "".join(pieces) == text[:expected]
    assert stream.stopped == bool(ends)


def test_what_can_be_no_stop_string_is_not_held_back():
    stream = TextStream(BYTES, ["###"])
    assert [stream.push(token) for token in b"a#b##c"] == ["a", "", "#b", "", "", "##c"]


def test_nothing_comes_after_the_stop_string():
    stream = TextStream(BYTES, ["x"])
    assert read(stream, b"abxcd") == ["a", "b", "", "", "", ""]


def test_an_empty_stop_string_is_refused():
    with pytest.raises(ValueError, match="stop strings must not be empty"):
        TextStream(BYTES, ["a", ""])


def test_a_tokenizer_that_glues_tokens_together_reads_as_a_whole():
    """Words that carry their space in front, and single bytes for what is no word."""
    pytest.importorskip("tokenizers")
    vocabulary = {"<unk>": 0, "▁the": 1, "▁cat": 2, "s": 3}
    vocabulary |= {f"<0x{byte:02X}>": 4 + byte for byte in range(256)}
    definition = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [],
        "normalizer": None, "pre_tokenizer": None, "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE", "dropout": None, "unk_token": "<unk>", "fuse_unk": False,
            "continuing_subword_prefix": None, "end_of_word_suffix": None,
            "byte_fallback": True, "vocab": vocabulary, "merges": [],
        },
    }  # fmt: skip
    tokenizer = JsonTokenizer(json.dumps(definition))
    ids = [1, 2, 3, *(4 + byte for byte in "中é".encode()), 2, 4 + 0xE9, 1]
    pieces = read(TextStream(tokenizer), ids)
    assert "".join(pieces) == tokenizer.decode(ids)
    assert pieces[:7] == ["the", " cat", "s", "", "", "中", ""]


def test_streamed_text_is_the_text(model):
    pieces = list(stream_text(model, BYTES, "ab", max_new_tokens=40, seed=1))
    whole = generate_text(model, BYTES, ["ab"], max_new_tokens=40, seed=1)[0]
    assert "".join(pieces) == whole
    assert len(pieces) > 1


def test_texts_of_a_batch_are_as_they_are_alone(model):
    prompts = ["ab", "c", "efg", "hi"]
    together = generate_text(model, BYTES, prompts, max_new_tokens=20, temperature=0)
    for prompt, text in zip(prompts, together, strict=True):
        assert generate_text(model, BYTES, [prompt], max_new_tokens=20, temperature=0) == [text]


def test_texts_of_a_batch_stop_each_for_itself(model):
    prompts = ["ab", "cd", "ef"]
    free = generate_text(model, BYTES, prompts, max_new_tokens=30, temperature=0)
    stop = free[1][4:6]
    stopped = generate_text(
        model, BYTES, prompts, max_new_tokens=30, temperature=0, stop=[stop]
    )
    assert stopped == [text.split(stop)[0] for text in free]
    assert stop in free[1]


def test_texts_of_a_batch_come_side_by_side_in_whole_characters(model):
    """Random bytes are rich in characters that are spread over several tokens."""
    prompts, settings = ["ab", "c"], {"max_new_tokens": 60, "seed": 0, "stop": ["x"]}
    written = ["", ""]
    order = []
    for row, piece in stream_texts(model, BYTES, prompts, **settings):
        written[row] += piece
        order.append(row)
    assert written == generate_text(model, BYTES, prompts, **settings)
    assert order != sorted(order)
    done = complete(model, prompts, tokenizer=BYTES, **settings)
    for text, tokens in zip(written, done.tokens, strict=True):
        assert text == bytes(tokens.tolist()).decode("utf-8", "replace").split("x")[0]


def test_a_stop_token_ends_the_text_and_is_not_part_of_it(model):
    free = generate_text(model, BYTES, ["ab"], max_new_tokens=30, seed=2)[0]
    tokens = BYTES.encode("ab")
    step = model.generate(torch.as_tensor(tokens)[None], max_new_tokens=30, seed=2)[
        0, 2:
    ].tolist()
    end = step[5]
    expected = BYTES.decode(step[: step.index(end)])
    settings = {"max_new_tokens": 30, "seed": 2, "stop_tokens": [end]}
    assert generate_text(model, BYTES, ["ab"], **settings) == [expected]
    assert "".join(stream_text(model, BYTES, "ab", **settings)) == expected
    assert free != expected


def test_no_work_is_done_after_a_stop_string(model):
    free = generate_text(model, BYTES, ["ab"], max_new_tokens=10, temperature=0)[0]
    calls = []
    hook = model.register_forward_hook(lambda *_: calls.append(1))
    list(stream_text(model, BYTES, "ab", max_new_tokens=1000, temperature=0, stop=[free[0]]))
    hook.remove()
    assert len(calls) < 10


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], r"a list of at least one row of tokens or one text, got \[\]"),
        ("ab", "a list of at least one row of tokens or one text, got 'ab'"),
        (["ab", ""], "at least one token, got none in row 1"),
        (["ab", 3], "prompts must all be tensors or all be texts, got 3"),
    ],
)
def test_bad_prompts_are_refused(model, prompts, message):
    with pytest.raises(ValueError, match=message):
        generate_text(model, BYTES, prompts, max_new_tokens=1)


def test_streaming_checks_at_once(model):
    with pytest.raises(ValueError, match="top_k must be a whole number of at least 1"):
        stream_text(model, BYTES, "a", max_new_tokens=1, top_k=0)


def test_one_stream_is_of_one_sample(model):
    with pytest.raises(ValueError, match=r"samples must be 1 for one stream of text, got 2: "):
        stream_text(model, BYTES, "a", max_new_tokens=1, samples=2)
    rows = {row for row, _ in stream_texts(model, BYTES, ["a"], max_new_tokens=9, samples=2)}
    assert rows == {0, 1}


def test_one_string_is_no_list_of_stop_strings(model):
    with pytest.raises(ValueError, match="stop must be a list of strings, got 'ab'"):
        stream_text(model, BYTES, "a", max_new_tokens=1, stop="ab")


def test_ids_that_the_tokenizer_does_not_have_are_never_chosen():
    model = MambaLM(MambaConfig(d_model=8, n_layer=1, vocab_size=5000, d_state=4))
    settings = {"max_new_tokens": 20, "temperature": 5.0, "seed": 0}
    (text,) = generate_text(model, BYTES, ["a"], **settings)
    assert "".join(stream_text(model, BYTES, "a", **settings)) == text != ""
