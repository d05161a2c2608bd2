"""Laws of rows in which documents begin: packed, each document is read as if it were alone."""

import re

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.testing import assert_close

from mambakit import MambaConfig, MambaLM
from mambakit.models import ModelState
from mambakit.models.documents import pack_documents


@pytest.fixture(scope="module")
def model(chosen_device):
    torch.manual_seed(0)
    config = MambaConfig(d_model=8, n_layer=2, vocab_size=16, d_state=4)
    return MambaLM(config, dtype=torch.float64).to(chosen_device)


def apart(model, rows, starts, state):
    """Read each row token by token, and forget what came before wherever a document begins."""
    logits, ends = [], []
    for row, (tokens, begins) in enumerate(zip(rows, starts.tolist(), strict=True)):
        before = None if state is None else state[row]
        for token, begin in zip(tokens, begins, strict=True):
            output = model(token.view(1, 1), None if begin else before)
            before = output.state
            logits.append(output.logits[0])
        ends.append(before)
    return torch.cat(logits), ModelState.cat(ends)


@settings(deadline=None, max_examples=20)
@given(
    starts=st.integers(1, 3).flatmap(
        lambda b: st.integers(1, 6).flatmap(
            lambda l: st.lists(
                st.lists(st.booleans(), min_size=l, max_size=l), min_size=b, max_size=b
            )
        )
    ),
    goes_on=st.booleans(),
)
def test_each_document_is_read_from_no_state_and_rows_go_on(model, starts, goes_on):
    starts = torch.tensor(starts, device="cpu")
    rows = torch.randint(16, starts.shape)
    state = model(torch.randint(16, (len(rows), 3))).state if goes_on else None
    tokens, cu_seqlens, before, ends = pack_documents(rows, starts, state)
    logits, after = model(tokens, before, cu_seqlens=cu_seqlens)
    expected, expected_ends = apart(model, rows, starts, state)
    assert_close(logits[0], expected)
    for layer, wanted in zip(after[ends].layers, expected_ends.layers, strict=True):
        assert_close(tuple(layer), tuple(wanted))


def test_a_state_hears_of_what_goes_on_from_it_alone(model):
    state = model(torch.randint(16, (3, 4))).state
    starts = torch.tensor([[0, 0], [1, 0], [0, 1]], device="cpu").bool()
    tokens, cu_seqlens, before, _ = pack_documents(torch.randint(16, (3, 2)), starts, state)
    logits = model(tokens, before, cu_seqlens=cu_seqlens).logits
    (gradient,) = torch.autograd.grad(logits.sum(), state.layers[0].ssm)
    assert [bool(row.any()) for row in gradient] == [True, False, True]


def test_where_nothing_goes_on_there_is_no_state(model):
    state = model(torch.randint(16, (2, 4))).state
    starts = torch.tensor([[1, 0], [1, 1]], device="cpu").bool()
    assert pack_documents(torch.randint(16, (2, 2)), starts, state).state is None


@pytest.mark.refuses
@pytest.mark.parametrize(
    ("shape", "starts", "rows", "message"),
    [
        # of ones and zeros as integers, "not a start" would be true of both
        ((2, 3), torch.zeros(2, 3, dtype=torch.int64), 2,
         "starts must be bool of the shape (2, 3) of tokens, got int64 of (2, 3)"),
        ((2, 3), torch.zeros(3, 2, dtype=torch.bool), 2,
         "starts must be bool of the shape (2, 3) of tokens, got bool of (3, 2)"),
        ((2, 3), torch.zeros(2, 4, dtype=torch.bool), 2,
         "starts must be bool of the shape (2, 3) of tokens, got bool of (2, 4)"),
        ((2, 0), torch.zeros(2, 0, dtype=torch.bool), 2,
         "tokens must have shape (b, l) with l at least 1, got (2, 0)"),
        ((3,), torch.zeros(3, dtype=torch.bool), 2,
         "tokens must have shape (b, l) with l at least 1, got (3,)"),
        ((2, 3), torch.zeros(2, 3, dtype=torch.bool), 3,
         "state must hold one sequence for each row, 2, got 3"),
    ],
)  # fmt: skip
def test_what_are_no_rows_of_documents_gets_one_clear_sentence(
    model, shape, starts, rows, message
):
    device = next(model.parameters()).device
    state = model(torch.randint(16, (rows, 4), device=device)).state
    tokens = torch.zeros(shape, dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match=f"^pack_documents: {re.escape(message)}$"):
        pack_documents(tokens, starts, state)
