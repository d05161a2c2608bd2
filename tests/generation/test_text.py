"""Laws of text as it comes: characters, stop strings, batches."""

import itertools
import json

import pytest
import torch
from hypothesis import given, settings, strategies as st

from mambakit import MambaConfig, MambaLM
from mambakit.data import ByteTokenizer, CharacterTokenizer
from mambakit.data.tokenizers import JsonTokenizer, _byte_alphabet
from mambakit.generation import (
    Bookmark,
    TextStream,
    beam_search,
    complete,
    generate_text,
    stream_text,
    stream_texts,
)

BYTES = ByteTokenizer()


@pytest.fixture
def model(make_model):
    return make_model(256)


def byte_fallback():
    """Words that carry their space in front, a space alone, and bytes for what is no word."""
    pytest.importorskip("tokenizers")
    vocabulary = {"<unk>": 0, "▁the": 1, "▁cat": 2, "s": 3, "▁": 4}
    vocabulary |= {f"<0x{byte:02X}>": 5 + byte for byte in range(256)}
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
    return JsonTokenizer(json.dumps(definition))


def metaspace():
    """Words that carry their space in front, which the first one loses."""
    tokenizers = pytest.importorskip("tokenizers")
    words = ["[UNK]", "▁hello", "▁world", "s", "▁", "▁cat", "é", "中"]
    model = tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, "[UNK]")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    tokenizer.decoder = tokenizers.decoders.Metaspace()
    return JsonTokenizer(tokenizer.to_str())


def byte_level():
    """Tokens of some bytes each, which begin and end within characters."""
    tokenizers = pytest.importorskip("tokenizers")
    pieces = [bytes([byte]) for byte in range(256)]
    pieces += [b" caf", b" \xc3", b"\xa9\xe4", b"\xb8\xad", b"\xe4\xb8"]
    shown = {byte: char for char, byte in _byte_alphabet().items()}
    vocabulary = {"".join(shown[byte] for byte in piece): i for i, piece in enumerate(pieces)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return JsonTokenizer(tokenizer.to_str())


def word_piece():
    """Words, between which there are spaces, and what goes on with a word."""
    tokenizers = pytest.importorskip("tokenizers")
    words = ["[UNK]", "the", "cat", "##s", "##walk", "sat", "中", "##é"]
    model = tokenizers.models.WordPiece({word: i for i, word in enumerate(words)})
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.decoder = tokenizers.decoders.WordPiece(cleanup=False)
    return JsonTokenizer(tokenizer.to_str())


TOKENIZERS = {
    "byte": lambda: BYTES,
    "character": lambda: CharacterTokenizer("abé中 \n"),
    "byte-fallback": byte_fallback,
    "metaspace": metaspace,
    "byte-level": byte_level,
    "word-piece": word_piece,
}


# Texts that UTF-8 spreads over several bytes; those of words alone are made of any tokens.
SPREAD = st.text(alphabet="a é中🐍", max_size=12)


def some_tokens(tokenizer, data):
    """Tokens of a text; what lies before or behind a cut is not always one."""
    if tokenizer.name == "json" and tokenizer.vocab_size == 8:
        return data.draw(st.lists(st.integers(1, 7), max_size=12))
    if tokenizer.name == "character":
        return data.draw(st.lists(st.integers(0, 5), max_size=12))
    if tokenizer.vocab_size == 261 and tokenizer.decode([1]) == "the":
        words = st.lists(st.integers(1, 4), max_size=3)
        parts = data.draw(st.lists(st.tuples(words, SPREAD), max_size=4))
        return [t for word, text in parts for t in [*word, *(5 + b for b in text.encode())]]
    return data.draw(
        st.one_of(
            st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=12),
            SPREAD.map(lambda text: list(text.encode())),
        )
    )


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


@settings(deadline=None, max_examples=50)
@given(data=st.data())
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_text_that_is_cut_is_the_same_text(kind, data):
    tokenizer = TOKENIZERS[kind]()
    ids = some_tokens(tokenizer, data)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=3)))
    text = ""
    for start, end in itertools.pairwise([0, *cuts, len(ids)]):
        stream = TextStream(tokenizer, before=ids[:start])
        text += "".join([*map(stream.push, ids[start:end]), stream.pause()])
    assert text + stream.finish() == tokenizer.decode(ids)


@settings(deadline=None, max_examples=50)
@given(
    text=st.text(alphabet="abé", max_size=20),
    stop=st.lists(st.text(alphabet="abé", min_size=1, max_size=4), min_size=1, max_size=3),
    data=st.data(),
)
def test_a_stop_string_across_a_cut_ends_the_text(text, stop, data):
    ids = text.encode()
    whole = TextStream(BYTES, stop)
    expected = "".join(read(whole, ids))
    cut = data.draw(st.integers(0, len(ids)))
    first = TextStream(BYTES, stop)
    begun = "".join([*map(first.push, ids[:cut]), first.pause()])
    if first.stopped:
        assert begun == expected
        return
    # what is out stays out
    joined = expected if len(expected) >= len(begun) else begun
    for then in (first, TextStream(BYTES, stop, before=ids[:cut], written=cut)):
        assert begun + "".join(read(then, ids[cut:])) == joined
        assert then.stopped == whole.stopped


def test_a_stop_string_does_not_begin_before_the_text():
    assert "".join(read(TextStream(BYTES, "EN", before=b"E"), b"Nx")) == "Nx"
    assert "".join(read(TextStream(BYTES, "EN", before=b"EEN", written=1), b"EN")) == ""
    assert "".join(read(TextStream(BYTES, "EN", before=b"aEN", written=3), b"bc")) == "bc"


def test_a_prompt_that_is_text_ends_with_what_it_shows():
    """Of tokens alone, nobody could tell a replacement character from half of one."""
    tokenizer = byte_fallback()
    before = [1, *(5 + byte for byte in "\ufffd".encode())]
    assert TextStream(tokenizer, before=before).push(3) == "s"
    assert TextStream(tokenizer, before=[1, 5 + 0xC3]).push(5 + 0xA9) == "é"
    assert TextStream(tokenizer, before=[1, 5 + 0xC3], whole=True).push(3) == "s"


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
    tokenizer = byte_fallback()
    ids = [1, 2, 3, *(5 + byte for byte in "中é".encode()), 2, 5 + 0xE9, 1]
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


@pytest.mark.refuses
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


@pytest.mark.parametrize("samples", [1, 2])
def test_each_prompt_may_have_stop_strings_of_its_own(model, samples):
    prompts = ["ab", "cd", "ef"]
    settings = {"max_new_tokens": 30, "seed": 7, "samples": samples}
    free = generate_text(model, BYTES, prompts, **settings)
    stops = [[free[0][4:6], "never"], free[samples][1], []]
    stopped = generate_text(model, BYTES, prompts, stop=stops, **settings)
    for row, (text, whole) in enumerate(zip(stopped, free, strict=True)):
        stop = [free[0][4:6], free[samples][1], "\ufffe"][row // samples]
        assert text == whole.split(stop)[0]
    assert stopped[0] != free[0]
    one = {**settings, "stop": free[0][4:6]}
    listed = {**settings, "stop": [free[0][4:6]]}
    assert generate_text(model, BYTES, prompts, **one) == generate_text(
        model, BYTES, prompts, **listed
    )


@pytest.mark.refuses
@pytest.mark.parametrize(
    ("stop", "words"),
    [
        (None, "stop must be a string or a list of them, got None"),
        (3, "stop must be a string or a list of them, got 3"),
        (b"x", "stop must be a string or a list of them, got b'x'"),
        ([1], "stop strings must be strings, got 1"),
        (["x", None], "stop strings must be strings, got None"),
        ([["x"], ["y", ""]], "stop strings must not be empty"),
        ([["x"], [["y"]]], r"stop strings must be strings, got \['y'\]"),
        ([["x"], None], "stop must be a string or a list of them, got None"),
        ([["x"]], r"for each prompt as there are prompts, 2, got \[\['x'\]\]"),
    ],
)
@pytest.mark.parametrize("tokenizer", [None, BYTES])
def test_stop_strings_that_are_none_are_refused(model, stop, words, tokenizer):
    prompts = [torch.tensor([1]), torch.tensor([2])]
    with pytest.raises(ValueError, match=f"^generate: .*{words}"):
        complete(model, prompts, max_new_tokens=1, stop=stop, tokenizer=tokenizer)


def test_a_stream_has_no_use_for_a_listener(model):
    with pytest.raises(ValueError, match="on_text must not be given to a stream"):
        stream_texts(model, BYTES, ["a"], max_new_tokens=1, on_text=print)


def say(tokens):
    """A processor that lets each of ``tokens`` follow the one before it, and nothing else."""
    following = dict(itertools.pairwise(tokens))

    def only(logits, texts):
        wanted = torch.tensor([[following[int(text[-1])]] for text in texts])
        return torch.full_like(logits, -torch.inf).scatter(1, wanted, 0.0)

    return [only]


SCRIPTS = {
    "byte": "aé中b".encode(),
    "character": [0, 4, 3, 5, 2],
    "metaspace": [1, 3, 4, 2, 5],
    "byte-fallback": [1, 2, 4, 3, *(5 + byte for byte in "é中".encode())],
    "byte-level": [256, 257, 258, 259, ord("b")],
    "word-piece": [1, 2, 3, 5, 6, 7],
}


@pytest.mark.parametrize("kind", SCRIPTS)
@pytest.mark.parametrize("search", [complete, beam_search])
def test_prompt_and_text_and_text_make_the_whole(make_model, tmp_path, kind, search):
    tokenizer, script = TOKENIZERS[kind](), list(SCRIPTS[kind])
    model, whole = make_model(tokenizer.vocab_size, n_layer=1), tokenizer.decode(script)
    settings = {"tokenizer": tokenizer, "logits_processors": say(script)}
    if search is complete:
        settings["temperature"] = 0
    for begin in range(1, len(script)):
        stream = TextStream(tokenizer)
        prompt = "".join([*map(stream.push, script[:begin]), stream.pause()])
        tokens = torch.tensor([script[:begin]])
        left = len(script) - begin
        done = search(model, tokens, max_new_tokens=left, **settings)
        assert prompt + done.texts[0] == whole
        for cut in range(1, left):
            first = search(model, tokens, max_new_tokens=cut, **settings)
            first.bookmark.save(tmp_path / "place")
            place = Bookmark.load(tmp_path / "place", device=model.device)
            then = search(model, state=place, max_new_tokens=left - cut, **settings)
            assert prompt + first.texts[0] + then.texts[0] == whole


def test_a_word_after_a_prompt_has_its_space(make_model):
    tokenizer = metaspace()
    settings = {"max_new_tokens": 2, "logits_processors": say([1, 2, 5])}
    model = make_model(tokenizer.vocab_size, n_layer=1)
    assert generate_text(model, tokenizer, ["hello"], **settings) == [" world cat"]
    assert list(stream_text(model, tokenizer, "hello", **settings)) == [" world", " cat"]
    found = beam_search(model, ["hello"], tokenizer=tokenizer, **settings)
    assert found.texts == (" world cat",)


@pytest.mark.parametrize("draft", [False, True])
def test_a_text_that_no_bookmark_follows_shows_what_it_has_begun(model, draft):
    begun = list("né".encode()[:2])
    settings = {"max_new_tokens": 1, "logits_processors": say(begun)}
    settings |= {"draft": model} if draft else {}
    assert generate_text(model, BYTES, ["n"], **settings) == ["\ufffd"]
    assert list(stream_text(model, BYTES, "n", **settings)) == ["\ufffd"]
    done = complete(model, ["n"], tokenizer=BYTES, **settings)
    assert done.texts == ("",)
    end = {"stop_tokens": [0xA9], "max_new_tokens": 2}
    script = {"logits_processors": say([*begun, 0xA9])}
    ended = complete(model, ["n"], tokenizer=BYTES, **settings | end | script)
    assert ended.texts == ("\ufffd",)


def test_a_stop_string_lies_across_a_bookmark_and_not_across_a_prompt(model):
    settings = {"tokenizer": BYTES, "stop": "END", "logits_processors": say(b"aEND!")}
    for cut in (1, 2):
        first = complete(model, ["a"], max_new_tokens=cut, **settings)
        assert first.texts == ("EN"[:cut],)
        middle = complete(model, state=first.bookmark, max_new_tokens=1, **settings)
        done = [complete(model, state=first.bookmark, max_new_tokens=9, **settings)]
        if cut == 1:
            done += [complete(model, state=middle.bookmark, max_new_tokens=9, **settings)]
            done += [complete(model, [""], state=first.bookmark, max_new_tokens=9, **settings)]
        for each in done:
            assert (each.texts, each.finish_reasons) == (("",), ("stop_string",))
    free = settings | {"stop": ()}
    again = complete(model, state=done[0].bookmark, max_new_tokens=1, **free)
    assert again.texts == ("!",)
    said = complete(model, ["aEN"], max_new_tokens=2, **settings)
    after = complete(model, ["EN"], state=first.bookmark, max_new_tokens=2, **settings)
    assert said.texts == after.texts == ("D!",)


def test_ids_that_the_tokenizer_does_not_have_are_never_chosen():
    model = MambaLM(MambaConfig(d_model=8, n_layer=1, vocab_size=5000, d_state=4))
    settings = {"max_new_tokens": 20, "temperature": 5.0, "seed": 0}
    (text,) = generate_text(model, BYTES, ["a"], **settings)
    assert "".join(stream_text(model, BYTES, "a", **settings)) == text != ""


@pytest.mark.parametrize("prompt", [[256, 97, 98], [97] * 20 + [256], [256] + [97] * 20])
def test_a_prompt_may_hold_ids_that_are_no_text(make_model, prompt):
    """A model may have ids, of a beginning or an end, that its tokenizer has no text for."""
    model, tokenizer = make_model(264), ByteTokenizer()
    three = {"tokenizer": tokenizer, "max_new_tokens": 3}
    six = three | {"max_new_tokens": 6}
    done = complete(model, [torch.tensor(prompt)], temperature=0, **three)
    assert max(map(int, done.tokens[0])) < 256
    assert beam_search(model, [torch.tensor(prompt)], beams=1, best=1, **three).texts
    again = complete(model, state=done.bookmark, temperature=0, **three)
    whole = complete(model, [torch.tensor(prompt)], temperature=0, **six)
    assert done.texts[0] + again.texts[0] == whole.texts[0]


def test_texts_alone_take_no_settings_of_complete(make_model):
    with pytest.raises(ValueError, match="keep_states must not be given for texts alone"):
        generate_text(
            make_model(256), ByteTokenizer(), ["a"], max_new_tokens=2, keep_states=True
        )
