"""Each sampling rule against its definition, written slowly."""

import math

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.testing import assert_close

from mambakit.generation import SamplingRules
from mambakit.generation.sampling import (
    apply_temperature,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    likeliest,
    penalise_repetition,
    pick,
)

INF = float("inf")
scores = st.lists(st.integers(-20, 20).map(lambda i: i / 4), min_size=1, max_size=12)


def softmax(row):
    odds = [math.exp(x - max(row)) for x in row]
    return [o / sum(odds) for o in odds]


def kept(logits):
    return [i for i, x in enumerate(logits[0].tolist()) if x > -INF]


@settings(deadline=None)
@given(row=scores, k=st.integers(1, 14))
def test_top_k(row, k):
    last = sorted(row, reverse=True)[min(k, len(row)) - 1]
    assert kept(keep_top_k(torch.tensor([row]), k)) == [
        i for i, x in enumerate(row) if x >= last
    ]


@settings(deadline=None)
@given(row=scores, p=st.floats(0.01, 0.99))
def test_top_p(row, p):
    probabilities = softmax(row)
    total, expected = 0.0, []
    for i in sorted(range(len(row)), key=lambda i: (-row[i], i)):
        if expected and abs(total - p) < 1e-5:
            return  # On the border rounding decides.
        if expected and total >= p:
            break
        expected.append(i)
        total += probabilities[i]
    assert kept(keep_top_p(torch.tensor([row]), p)) == sorted(expected)


@settings(deadline=None)
@given(row=scores, p=st.floats(0.001, 1))
def test_min_p(row, p):
    probabilities = softmax(row)
    shares = [x / max(probabilities) for x in probabilities]
    if any(abs(share - p) < 1e-5 and share < 1 for share in shares):
        return  # On the border rounding decides.
    assert kept(keep_min_p(torch.tensor([row]), p)) == [
        i for i, share in enumerate(shares) if share >= p
    ]


@settings(deadline=None)
@given(row=scores, penalty=st.floats(0.5, 3), data=st.data())
def test_repetition_penalty(row, penalty, data):
    seen = data.draw(st.lists(st.booleans(), min_size=len(row), max_size=len(row)))
    expected = [
        x if not met else x / penalty if x > 0 else x * penalty
        for x, met in zip(row, seen, strict=True)
    ]
    logits = penalise_repetition(torch.tensor([row]), torch.tensor([seen]), penalty)
    assert_close(logits, torch.tensor([expected]))


def test_temperature():
    assert_close(
        apply_temperature(torch.tensor([[1.0, -3.0]]), 2.0), torch.tensor([[0.5, -1.5]])
    )


@pytest.mark.parametrize(
    "rule",
    [
        lambda x: keep_top_k(x, 2),
        lambda x: keep_top_p(x, 0.5),
        lambda x: keep_min_p(x, 0.5),
        lambda x: apply_temperature(x, 0.5),
        lambda x: penalise_repetition(x, torch.ones(2, 5, dtype=torch.bool), 2.0),
        lambda x: SamplingRules(0.7, 4, 0.9, 0.1, 1.3).apply(x, torch.ones(2, 5).bool()),
    ],
)
def test_rules_change_nothing_in_place_and_work_row_by_row(rule):
    torch.manual_seed(0)
    logits = torch.randn(2, 5)
    before = logits.clone()
    result = rule(logits)
    assert_close(logits, before, rtol=0, atol=0)
    swapped = rule(logits.flip(0))
    assert_close(swapped.flip(0), result)


def test_rules_apply_in_the_promised_order():
    torch.manual_seed(0)
    logits, seen = 3 * torch.randn(4, 30), torch.rand(4, 30) < 0.3
    expected = penalise_repetition(logits, seen, 1.4)
    expected = apply_temperature(expected, 0.8)
    expected = keep_min_p(keep_top_p(keep_top_k(expected, 12), 0.9), 0.02)
    rules = SamplingRules(0.8, 12, 0.9, 0.02, 1.4)
    assert_close(rules.apply(logits, seen), expected, rtol=0, atol=0)


def test_neutral_settings_change_nothing():
    logits = torch.randn(2, 9)
    rules = SamplingRules(1.0, 9, 1.0, 0.0, 1.0)
    assert_close(rules.apply(logits), logits, rtol=0, atol=0)


@pytest.mark.parametrize("p", [0.3, 0.9])
def test_top_p_of_what_other_rules_have_left_is_that_of_all(p):
    logits = 2 * torch.randn(3, 60).round()  # of many that are equally likely
    left = keep_top_k(logits, 5)
    wanted = torch.full_like(left, -torch.inf)
    for row, scores in enumerate(left):
        (few,) = (scores > -torch.inf).nonzero(as_tuple=True)
        wanted[row, few] = keep_top_p(scores[None, few], p)[0]
    assert_close(keep_top_p(left, p), wanted, rtol=0, atol=0)


@pytest.mark.parametrize("width", [7, 50280])
def test_the_likeliest_is_the_first_of_the_largest(width):
    scores = torch.randn(4, width + 3).round()[:, :width]
    scores[1] = -torch.inf
    scores[2, width // 2] = torch.nan
    scores[3, 2] = torch.inf
    tokens, best = likeliest(scores)
    assert tokens.tolist() == scores.argmax(dim=-1).tolist()
    assert_close(best, scores.amax(dim=-1), rtol=0, atol=0, equal_nan=True)
    assert best.isfinite().tolist() == [True, False, False, False]
    assert likeliest(scores[:0]).tokens.shape == (0,)


@pytest.mark.parametrize("rules", [SamplingRules(0), SamplingRules(0.3, 3), SamplingRules()])
def test_a_choice_tells_whether_there_was_one(rules):
    scores = torch.randn(4, 9)
    scores[1] = -torch.inf
    scores[2, 1] = torch.nan
    scores[3, 2] = torch.inf
    choice = rules.choose_scored(scores, u=torch.rand(4, dtype=torch.float64))
    assert choice.best.isfinite().tolist() == [True, False, False, False]


def test_temperature_zero_takes_the_first_of_the_most_likely():
    logits = torch.tensor([[0.0, 2.0, 2.0], [3.0, 1.0, 3.0]])
    assert SamplingRules(temperature=0).choose(logits).tolist() == [1, 0]


def test_temperature_zero_still_hears_the_repetition_penalty():
    seen = torch.tensor([[False, True, False]])
    rules = SamplingRules(temperature=0, repetition_penalty=3.0)
    assert rules.choose(torch.tensor([[1.0, 2.0, 0.0]]), seen).tolist() == [0]


def test_tokens_are_drawn_with_their_probabilities():
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05, 0.0])
    rows = 40_000
    chance = torch.rand(rows, dtype=torch.float64)
    drawn = SamplingRules().choose(probabilities.log().expand(rows, 5), u=chance)
    shares = drawn.bincount(minlength=5) / rows
    deviation = (probabilities * (1 - probabilities) / rows).sqrt()
    assert ((shares - probabilities).abs() <= 4 * deviation).all()


@pytest.mark.parametrize("temperature", [1e-3, 1e-37])
def test_a_temperature_near_zero_draws_the_likeliest(temperature):
    scores, u = torch.tensor([[1.0, 20, 3], [5, 1, 0]]), torch.tensor([0.1, 0.9]).double()
    choice = SamplingRules(temperature=temperature).choose_scored(scores, u=u)
    assert choice.tokens.tolist() == [1, 0]


def test_a_row_of_no_numbers_draws_some_token():
    odds = torch.tensor([[torch.nan, 0, 0], [0, 0, torch.nan], [0, 0, 0]])
    assert set(pick(odds, torch.rand(3).double()).tolist()) <= {0, 1, 2}


def test_top_p_hears_no_other_row():
    rows = torch.full((2, 400), -torch.inf)
    rows[0, :7] = torch.rand(7)
    rows[1] = torch.randn(400)
    for p in rows[0].softmax(-1)[:7].sort(descending=True).values.cumsum(0).tolist():
        assert torch.equal(keep_top_p(rows, p)[0], keep_top_p(rows[:1], p)[0])


def test_forbidden_tokens_are_never_drawn():
    logits = torch.full((5_000, 8), -INF)
    logits[:, 3] = -700.0
    assert SamplingRules().choose(logits).unique().tolist() == [3]


@settings(deadline=None)
@given(
    odds=st.lists(st.integers(0, 8).map(lambda i: i / 8), min_size=1, max_size=9).filter(any),
    u=st.one_of(st.floats(0, 1, exclude_max=True), st.sampled_from([0.0, 1 - 2**-53])),
)
def test_a_draw_is_the_inverse_of_the_distribution(odds, u):
    token = pick(torch.tensor([odds]), torch.tensor([u], dtype=torch.float64)).item()
    assert odds[token] > 0
    below = sum(odds[:token])
    # a token more or less where u falls upon a border, to rounding
    assert below - 1e-9 <= u * sum(odds) <= below + odds[token] + 1e-9


def test_without_chance_a_draw_asks_torch():
    odds = torch.rand(50, 9)
    torch.manual_seed(1)
    first = pick(odds)
    torch.manual_seed(1)
    assert_close(pick(odds), first)
    assert not torch.equal(pick(odds), first)


def test_short_dtypes_are_drawn_in_float32():
    assert SamplingRules(0.5).apply(torch.randn(1, 4).bfloat16()).dtype == torch.float32


@pytest.mark.refuses
@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"temperature": -1.0}, r"temperature must be 0 or a positive number, got -1\.0"),
        ({"temperature": float("nan")}, "temperature must be 0 or a positive number, got nan"),
        ({"temperature": "a"}, "temperature must be 0 or a positive number, got 'a'"),
        ({"top_k": 0}, "top_k must be a whole number of at least 1, got 0"),
        ({"top_k": 1.5}, r"top_k must be a whole number of at least 1, got 1\.5"),
        ({"top_k": True}, "top_k must be a whole number of at least 1, got True"),
        ({"top_p": "a"}, r"top_p must be in \(0, 1\], got 'a'"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0\.0"),
        ({"top_p": 1.5}, r"top_p must be in \(0, 1\], got 1\.5"),
        ({"min_p": -0.1}, r"min_p must be in \[0, 1\], got -0\.1"),
        (
            {"repetition_penalty": 0.0},
            r"repetition_penalty must be a positive number, got 0\.0",
        ),
    ],
)
def test_bad_settings_are_named(settings_, message):
    with pytest.raises(ValueError, match=f"generate: {message}"):
        SamplingRules(**settings_)
