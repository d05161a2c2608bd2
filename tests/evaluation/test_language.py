"""Laws of the score: it is the cost of the text, however the text is cut."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from mambakit import MambaConfig, MambaLM
from mambakit.data import ByteTokenizer, CharacterTokenizer
from mambakit.evaluation import LanguageScore, evaluate_files, evaluate_tokens, evaluate_whole


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = MambaLM(MambaConfig(d_model=16, n_layer=2, vocab_size=256, d_state=4))
    with torch.no_grad():  # far from the uniform guess that a new model makes
        model.backbone.embedding.weight.mul_(20)
    return model


@pytest.fixture
def tokens():
    return np.random.default_rng(0).integers(0, 256, 90).astype(np.uint8)


def test_it_is_the_cross_entropy_of_the_whole_text(model, tokens):
    ids = torch.from_numpy(tokens.astype(np.int64))[None]
    with torch.no_grad():
        logits = model(ids[:, :-1]).logits
    expected = F.cross_entropy(logits[0].double(), ids[0, 1:], reduction="sum")
    score = evaluate_tokens(model, tokens)
    assert score.tokens == 89
    assert score.nats == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("chunk", [1, 7, 64, 89, 1000])
def test_the_chunk_changes_nothing(model, tokens, chunk):
    whole = evaluate_tokens(model, tokens, chunk=4096)
    score = evaluate_tokens(model, tokens, chunk=chunk)
    assert score.tokens == whole.tokens
    assert score.nats == pytest.approx(whole.nats, rel=1e-5)


def test_rows_are_scored_as_texts_of_their_own(model, tokens):
    parts = [evaluate_tokens(model, tokens[i * 29 : (i + 1) * 29 + 1]) for i in range(3)]
    together = evaluate_tokens(model, tokens, rows=3, chunk=10)
    assert together.tokens == 87
    assert together.nats == pytest.approx(sum(part.nats for part in parts), rel=1e-5)


def test_the_limit_takes_the_beginning_of_each_row(model, tokens):
    parts = [evaluate_tokens(model, tokens[i * 29 : i * 29 + 11]) for i in range(3)]
    together = evaluate_tokens(model, tokens, rows=3, limit=30)
    assert together.tokens == 30
    assert together.nats == pytest.approx(sum(part.nats for part in parts), rel=1e-5)


DOCUMENTS = np.array([0, 1, 1, 30, 31, 75, 90])


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_documents_that_are_told_apart_are_scored_one_by_one(model, tokens, chunk):
    apart = [tokens[slice(*ends)] for ends in itertools.pairwise(DOCUMENTS)]
    scores = [evaluate_tokens(model, document) for document in apart if len(document) > 1]
    together = evaluate_tokens(model, tokens, chunk=chunk, documents=DOCUMENTS)
    assert together.tokens == sum(score.tokens for score in scores) == 85
    assert together.nats == pytest.approx(sum(score.nats for score in scores), rel=1e-5)


def test_rows_of_documents_are_texts_of_their_own(model, tokens):
    ends = ([0, 1, 30], [0, 1, 2, 30], [0, 17, 30])
    parts = [
        evaluate_tokens(model, tokens[i * 29 : (i + 1) * 29 + 1], documents=np.array(ends[i]))
        for i in range(3)
    ]
    together = evaluate_tokens(model, tokens, rows=3, chunk=10, documents=DOCUMENTS)
    assert together.tokens == sum(part.tokens for part in parts)
    assert together.nats == pytest.approx(sum(part.nats for part in parts), rel=1e-5)


def test_the_first_token_of_each_document_is_a_guess(model, tokens):
    whole = evaluate_whole(model, ByteTokenizer(), tokens, size=90, documents=DOCUMENTS)
    rest = evaluate_tokens(model, tokens, documents=DOCUMENTS)
    assert (whole.tokens, whole.bytes) == (90, 90)
    assert whole.nats == pytest.approx(rest.nats + 5 * math.log(256))
    alone = evaluate_whole(model, ByteTokenizer(), tokens[:3], size=3, documents=np.arange(4))
    assert alone == LanguageScore(3 * math.log(256), 3, 3)


def test_the_figures_follow_from_the_sum():
    score = LanguageScore(nats=8 * math.log(2), tokens=4, bytes=2)
    assert score.bits_per_byte == pytest.approx(4)
    assert score.loss == pytest.approx(2 * math.log(2))
    assert score.perplexity == pytest.approx(4)
    assert score + score == LanguageScore(16 * math.log(2), 8, 4)


def test_bytes_follow_from_tokens(model, tokens):
    assert evaluate_tokens(model, tokens, tokens_per_byte=0.25).bytes == 4 * 89


def test_it_leaves_the_model_as_it_was(model, tokens):
    model.train()
    evaluate_tokens(model, tokens)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_files_are_complete_codes(model, tmp_path):
    (tmp_path / "a.txt").write_text("one text")
    (tmp_path / "b.txt").write_text("x")
    scores = evaluate_files(model, ByteTokenizer(), [tmp_path / "a.txt", tmp_path / "b.txt"])
    a, b = scores.values()
    assert list(scores) == [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]
    assert (a.tokens, a.bytes) == (8, 8)
    assert b == LanguageScore(math.log(256), 1, 1)
    assert b.bits_per_byte == pytest.approx(8)


@pytest.mark.parametrize(
    ("tokens", "settings", "sentence"),
    [
        ([1], {}, "tokens must number at least 2, got 1"),
        ([1, 2, 3], {"rows": 3}, "tokens must number at least 4, got 3"),
        ([1, 300], {}, r"tokens must be in \[0, 256\), the model's vocabulary, got 300"),
        ([1, 2, -3], {}, r"tokens must be in \[0, 256\), the model's vocabulary, got -3"),
        ([1, 2], {"chunk": 0}, "chunk must be at least 1, got 0"),
        ([1, 2], {"limit": 0}, "limit must be at least 1, got 0"),
        ([1, 2], {"documents": np.arange(3)}, "must have tokens to score after their first"),
    ],
)
def test_what_cannot_be_scored_is_refused(model, tokens, settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        evaluate_tokens(model, np.array(tokens), **settings)


def test_files_that_cannot_be_scored_are_named(model, tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"ab\xff")
    (tmp_path / "empty.txt").write_bytes(b"")
    characters = CharacterTokenizer("ab")
    for name, sentence in (
        ("bad.txt", r"bad\.txt must be UTF-8.* 0xff at offset 2"),
        ("empty.txt", r"empty\.txt must hold text, got an empty file"),
        ("none.txt", r"there is no file or folder .*none\.txt"),
    ):
        with pytest.raises(ValueError, match=sentence):
            evaluate_files(model, characters, [tmp_path / name])
    (tmp_path / "c.txt").write_text("abc")
    with pytest.raises(ValueError, match=r"c\.txt: character tokenizer: .* got 'c'"):
        evaluate_files(model, characters, [tmp_path / "c.txt"])


def test_a_text_without_a_token_is_named(model, tmp_path, monkeypatch):
    monkeypatch.setattr(ByteTokenizer, "encode", lambda self, text: np.array([], np.int64))
    (tmp_path / "blank.txt").write_text(" \n")
    with pytest.raises(ValueError, match=r"blank\.txt: its text must have tokens, got none$"):
        evaluate_files(model, ByteTokenizer(), [tmp_path / "blank.txt"])
