"""Decoding with weights rounded: what it is equal to, and where it cannot be had."""

import pytest
import torch
from torch.testing import assert_close

from mambakit import MambaLM
from mambakit.generation import beam_search, complete, generate, stream
from mambakit.generation.cpu_step import rounded
from mambakit.ops import _native

V = 21
GREEDY = {"max_new_tokens": 20, "temperature": 0}

needs_library = pytest.mark.skipif(
    _native.unavailable() is not None, reason=str(_native.unavailable())
)
pytestmark = pytest.mark.cpu


def lists(rows):
    return [row.tolist() for row in rows]


def greedy_by_hand(model, prompt, weights, count):
    """The prompt by the model's own weights, the tokens by those that are rounded."""
    decoder = rounded(model, weights)
    tokens = []
    with torch.no_grad():
        logits, state = model(prompt[None], last_only=True)
        for _ in range(count):
            tokens.append(int(logits[0, -1, :V].argmax()))
            logits, state = decoder(torch.tensor([tokens[-1:]]), state)
    return tokens


@needs_library
@pytest.mark.parametrize("weights", ["bf16", "int8"])
def test_new_tokens_read_the_rounded_weights(model, prompts, weights):
    done = complete(model, prompts, weights=weights, **GREEDY)
    wanted = [greedy_by_hand(model, prompt, weights, 20) for prompt in prompts]
    assert lists(done.tokens) == wanted
    whole = generate(model, prompts[0][None], weights=weights, **GREEDY)
    assert whole[0, len(prompts[0]) :].tolist() == wanted[0]
    steps = stream(model, prompts[0][None], weights=weights, **GREEDY)
    assert torch.cat(list(steps)).tolist() == wanted[0]
    best = beam_search(model, prompts[:1], max_new_tokens=20, beams=1, weights=weights)
    assert best.tokens[0].tolist() == wanted[0]


@needs_library
def test_rounding_changes_the_probabilities(model, prompts):
    own = complete(model, prompts, **GREEDY)
    short = complete(model, prompts, weights="int8", **GREEDY)
    assert not torch.equal(own.log_probabilities[0][1:], short.log_probabilities[0][1:])
    assert_close(own.log_probabilities[0][0], short.log_probabilities[0][0])


@needs_library
@pytest.mark.parametrize("weights", ["bf16", "int8"])
def test_a_draft_changes_no_token(make_model, model, prompts, weights):
    draft = make_model(V)
    draft.load_state_dict(model.state_dict())
    with torch.no_grad():
        draft.lm_head.weight += 0.25 * torch.randn_like(draft.lm_head.weight)
    alone = complete(model, prompts, weights=weights, **GREEDY)
    both = complete(model, prompts, weights=weights, draft=draft, **GREEDY)
    assert lists(both.tokens) == lists(alone.tokens)
    assert 0 < both.acceptance < 1


@needs_library
@pytest.mark.parametrize("weights", ["bf16", "int8"])
@pytest.mark.parametrize("count", [1, 2, 20])
def test_a_draft_changes_no_probability(make_model, model, prompts, weights, count):
    # the first token follows the prompt, which the model reads with its own weights
    settings = GREEDY | {"max_new_tokens": count, "weights": weights}
    alone = complete(model, prompts, **settings)
    both = complete(model, prompts, draft=make_model(V), **settings)
    assert lists(both.tokens) == lists(alone.tokens)
    for found, wanted in zip(both.log_probabilities, alone.log_probabilities, strict=True):
        assert_close(found, wanted)
    ends = zip(both.bookmark.state.layers, alone.bookmark.state.layers, strict=True)
    for found, wanted in ends:
        assert_close(tuple(found), tuple(wanted))


@pytest.mark.refuses
@pytest.mark.parametrize("search", [complete, beam_search])
@pytest.mark.parametrize("weights", ["int4", "", 8, torch.int8, ["int8"]])
def test_other_weights_are_refused(model, prompts, search, weights):
    with pytest.raises(ValueError, match="generate: weights must be None or one of bf16, int8"):
        search(model, prompts, max_new_tokens=1, weights=weights)


@pytest.mark.parametrize(
    "ask",
    [
        lambda model, prompts, _: complete(model, prompts, max_new_tokens=1, weights="int8"),
        lambda model, prompts, draft: complete(
            model, prompts, max_new_tokens=1, weights="int8", draft=draft
        ),
        lambda model, prompts, _: stream(
            model, prompts[0][None], max_new_tokens=1, weights="int8"
        ),
        lambda model, prompts, _: beam_search(model, prompts, max_new_tokens=1, weights="int8"),
    ],
)
def test_a_model_that_the_step_cannot_stand_for_is_refused_at_once(model, prompts, ask):
    other = MambaLM(model.config, backend="reference")
    with pytest.raises(RuntimeError, match=r"^generate: weights must be None here.*got 'int8'"):
        ask(other, prompts, model)
