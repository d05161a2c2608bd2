"""Laws of going back."""

import pytest
import torch
from torch.testing import assert_close

from mambakit.generation import StateHistory


@pytest.fixture
def states(model):
    """The states before and after each of six tokens, for two rows."""
    states = [model(torch.randint(21, (2, 4))).state]
    for _ in range(6):
        states.append(model(torch.randint(21, (2, 1)), states[-1]).state)
    return states


def filled(states, depth):
    history = StateHistory(states[0], depth)
    for state in states[1:]:
        history = history.push(state)
    return history


@pytest.mark.parametrize("depth", [0, 1, 4, 9])
def test_it_goes_back_to_the_very_states(states, depth):
    history = filled(states, depth)
    assert len(history) == min(depth, 6)
    for tokens in range(len(history) + 1):
        back = history.rewind(tokens)
        assert back.state is states[6 - tokens]
        assert len(back) == len(history) - tokens


def test_decoding_goes_on_from_there_as_if_nothing_had_come_after(model, states):
    with torch.no_grad():
        again = model(torch.tensor([[1], [2]]), filled(states, 4).rewind(3).state)
        expected = model(torch.tensor([[1], [2]]), states[3])
    assert_close(again.logits, expected.logits, rtol=0, atol=0)


def test_after_going_back_it_fills_again(states):
    history = filled(states, 3).rewind(2).push(states[0])
    assert [len(history), history.rewind(1).state is states[4]] == [2, True]


def test_it_holds_the_memory_of_its_states(states):
    assert filled(states, 2).nbytes == 3 * states[0].nbytes
    shared = StateHistory(states[0], 2).push(states[0])
    assert shared.nbytes == states[0].nbytes


@pytest.mark.refuses
@pytest.mark.parametrize("tokens", [3, -1, 1.5, "1"])
def test_it_reaches_back_so_far_and_no_further(states, tokens):
    with pytest.raises(
        ValueError, match=f"rewind: tokens must be from 0 to 2, .*got {tokens!r}"
    ):
        filled(states, 2).rewind(tokens)


@pytest.mark.refuses
@pytest.mark.parametrize("depth", [-1, "2", 1.5, True])
def test_a_depth_that_is_no_count_is_refused(states, depth):
    sentence = f"^StateHistory: depth must be a whole number of at least 0, got {depth!r}$"
    with pytest.raises(ValueError, match=sentence):
        StateHistory(states[0], depth)


@pytest.mark.refuses
def test_what_is_no_state_is_refused(states):
    with pytest.raises(ValueError, match="StateHistory: state must be a ModelState, got int"):
        StateHistory(states[0], 2).push(3)
