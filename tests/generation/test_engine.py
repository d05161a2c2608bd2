"""Where looking at a number means waiting for it, the engine chooses the same tokens."""

import pytest
import torch
from torch.testing import assert_close

from mambakit.generation import complete, engine, generate
from mambakit.generation.stopping import Stopping

V = 21
GREEDY = {"temperature": 0}
DRAWN = {"seed": 5, "top_k": 7, "repetition_penalty": 1.2}


@pytest.fixture
def waiting(monkeypatch, chosen_device):
    """Say how the engine is to take the device: as one that has to be waited for, or not."""

    def take(value):
        monkeypatch.setattr(engine, "_AT_ONCE", set() if value else {chosen_device.type})

    return take


@pytest.mark.parametrize("settings", [GREEDY, DRAWN, {**DRAWN, "samples": 2}])
@pytest.mark.parametrize(
    "stop_tokens", [(), range(0, V, 5), [[1, 2, 3], [4], [], list(range(V))]]
)
def test_it_chooses_the_same_and_keeps_the_same_states(
    model, prompts, waiting, settings, stop_tokens
):
    def result(value):
        waiting(value)
        return complete(model, prompts, max_new_tokens=9, stop_tokens=stop_tokens, **settings)

    wanted, got = result(False), result(True)
    assert got.finish_reasons == wanted.finish_reasons
    for one, other in zip(got.tokens, wanted.tokens, strict=True):
        assert torch.equal(one, other)
    for one, other in zip(got.log_probabilities, wanted.log_probabilities, strict=True):
        assert_close(one, other)
    assert torch.equal(got.bookmark.unread, wanted.bookmark.unread)
    for layer, other in zip(
        got.bookmark.state.layers, wanted.bookmark.state.layers, strict=True
    ):
        assert_close(layer.ssm, other.ssm)
        assert_close(layer.conv, other.conv)


@pytest.mark.parametrize("settings", [GREEDY, DRAWN])
@pytest.mark.parametrize("stop_tokens", [(), (1,)])
@pytest.mark.parametrize(
    ("value", "whole"),
    [(torch.nan, True), (torch.inf, True), (-torch.inf, True), (torch.inf, False)],
)
@pytest.mark.parametrize("late", [True, False])
def test_scores_that_nothing_can_be_chosen_from_are_refused(
    model, waiting, settings, stop_tokens, value, whole, late
):
    def spoil(scores, rows):
        spoilt = scores.clone()
        spoilt[1, slice(None) if whole else 0] = value if len(rows[1]) == 5 else 0
        spoilt[:, 1] = -torch.inf  # the token that would end a row
        return spoilt

    waiting(late)
    with pytest.raises(ValueError, match=r"^generate: logits must be numbers .* in row 1"):
        generate(
            model,
            torch.randint(V, (2, 3)),
            max_new_tokens=6,
            logits_processors=[spoil],
            stop_tokens=stop_tokens,
            **settings,
        )


@pytest.mark.parametrize(("late", "wanted"), [(True, [2, 3, 3]), (False, [1, 2, 3])])
def test_the_next_step_is_on_its_way_before_a_look(model, waiting, monkeypatch, late, wanted):
    reads, looks, look = [], [], Stopping.look
    model.register_forward_pre_hook(lambda *_: reads.append(1))

    def note(self, row, token):
        looks.append(len(reads))
        return look(self, row, token)

    monkeypatch.setattr(Stopping, "look", note)
    waiting(late)
    prompt = torch.randint(V, (1, 3))
    free = generate(model, prompt, max_new_tokens=3, **GREEDY)
    reads.clear()
    end = min(set(range(V)) - set(free[0].tolist()))
    generate(model, prompt, max_new_tokens=3, stop_tokens=[end], **GREEDY)
    assert looks == wanted


def test_complex_scores_are_refused(model):
    with pytest.raises(ValueError, match=r"must return real logits, got torch\.complex64$"):
        generate(
            model,
            torch.randint(V, (2, 3)),
            max_new_tokens=2,
            logits_processors=[lambda scores, rows: scores.to(torch.complex64)],
        )
