"""Laws of a batch's gradient: chunks change what is in memory, and nothing else."""

from contextlib import nullcontext
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from mambakit import MambaConfig, MambaLM
from mambakit.models import ModelState
from mambakit.training.gradient import add_gradients

L = 24


@pytest.fixture
def model():
    return MambaLM(MambaConfig(d_model=12, n_layer=3, vocab_size=17), dtype=torch.float64)


@pytest.fixture
def batch():
    return torch.randint(17, (2, 2, L)).unbind()


def gradients(model, tokens, targets, state=None, **options):
    model.zero_grad()
    options = {"autocast": nullcontext} | options
    loss, end = add_gradients(model, tokens, targets, state, **options)
    return loss, end, [p.grad for p in model.parameters()]


def test_it_is_the_gradient_of_the_mean_loss(model, batch):
    tokens, targets = batch
    loss, end, found = gradients(model, tokens, targets, share=0.5)
    output = model(tokens)
    expected = F.cross_entropy(output.logits.flatten(0, 1), targets.flatten())
    assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    for gradient, wanted in zip(
        found, torch.autograd.grad(0.5 * expected, list(model.parameters())), strict=True
    ):
        assert_close(gradient, wanted, rtol=1e-5, atol=1e-7)
    assert_close(end.layers[-1].ssm, output.state.layers[-1].ssm)
    assert not loss.requires_grad
    assert not end.layers[-1].ssm.requires_grad


@pytest.mark.parametrize("goes_on", [True, False])
@pytest.mark.parametrize("chunk", [1, 2, 8, 24])
def test_chunks_change_neither_loss_nor_state_nor_gradient(model, batch, chunk, goes_on):
    state = model(torch.randint(17, (2, 5))).state.detach() if goes_on else None
    expected = gradients(model, *batch, state)
    found = gradients(model, *batch, state, chunk=chunk)
    assert_close(found[0], expected[0])
    for layer, wanted in zip(found[1].layers, expected[1].layers, strict=True):
        assert_close(tuple(layer), tuple(wanted))
    assert_close(found[2], expected[2], rtol=1e-5, atol=1e-7)


def apart(model, tokens, targets, starts, state):
    """The mean loss of documents, and of what rows begin with, each read by itself."""
    losses, ends = [], []
    for row in range(len(tokens)):
        cuts = [0, *(starts[row, 1:].nonzero()[:, 0] + 1).tolist(), L]
        before = None if state is None or starts[row, 0] else state[row]
        for left, right in pairwise(cuts):
            output = model(tokens[row : row + 1, left:right], before)
            some = targets[row, left:right]
            losses.append(F.cross_entropy(output.logits[0], some, reduction="none"))
            before = None
        ends.append(output.state)
    losses = torch.cat(losses)
    return losses.sum() / (targets >= 0).sum(), ModelState.cat(ends)


@pytest.mark.parametrize("goes_on", [True, False])
@pytest.mark.parametrize("chunk", [None, 1, 8])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_documents_are_read_apart(model, batch, chunk, goes_on, share):
    tokens, targets = batch
    starts = torch.rand(2, L, device="cpu") < share
    targets = targets.clone()
    targets[:, :-1][starts[:, 1:]] = -100
    if share == 1:
        targets[:, -1] = 3  # else nothing is wanted
    state = model(torch.randint(17, (2, 5))).state.detach() if goes_on else None
    found = gradients(model, tokens, targets, state, starts=starts, chunk=chunk)
    loss, end = apart(model, tokens, targets, starts, state)
    expected = torch.autograd.grad(loss, list(model.parameters()))
    assert_close(found[0].double(), loss, rtol=1e-6, atol=0)
    for layer, wanted in zip(found[1].layers, end.layers, strict=True):
        assert_close(tuple(layer), tuple(wanted))
    for gradient, wanted in zip(found[2], expected, strict=True):
        assert_close(gradient, wanted, rtol=1e-5, atol=1e-7)


def test_where_nothing_is_wanted_nothing_is_learnt(model, batch):
    tokens, targets = batch
    starts = torch.ones(2, L, dtype=torch.bool, device="cpu")
    nothing = torch.full_like(targets, -100)
    loss, _, found = gradients(model, tokens, nothing, starts=starts, chunk=8)
    assert loss == 0
    assert not any(gradient.any() for gradient in found)


def test_gradients_are_added_to_those_that_are_there(model, batch):
    _, _, once = gradients(model, *batch)
    doubled = [2 * gradient for gradient in once]
    add_gradients(model, *batch, None, autocast=nullcontext, chunk=8)
    found = [p.grad for p in model.parameters()]
    assert_close(found, doubled, rtol=1e-5, atol=1e-7)


def test_chunks_work_under_autocast(batch, device):
    model = MambaLM(MambaConfig(d_model=12, n_layer=3, vocab_size=17))
    autocast = partial(torch.autocast, device.type, torch.bfloat16)
    loss, _, expected = gradients(model, *batch, autocast=autocast)
    again, _, found = gradients(model, *batch, autocast=autocast, chunk=6)
    assert_close(again, loss, rtol=1e-3, atol=0)
    for gradient, wanted in zip(found, expected, strict=True):
        assert (gradient - wanted).norm() <= 0.05 * wanted.norm() + 1e-4


def test_a_graph_holds_one_chunk(model, batch):
    longest = 0

    def see(tensor):
        nonlocal longest
        longest = max(longest, *tensor.shape[1:2], 0)
        return tensor

    # no weight of this model is as wide as the chunk is long
    tokens, targets = (t.repeat(1, 40) for t in batch)
    with torch.autograd.graph.saved_tensors_hooks(see, lambda tensor: tensor):
        gradients(model, tokens, targets, chunk=120)
    assert longest == 120
