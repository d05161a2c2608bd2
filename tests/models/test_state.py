"""Laws of the state of a model."""

import dataclasses

import pytest
import torch
from torch.testing import assert_close
from torch.utils import _pytree as pytree

from mambakit import MambaConfig, MambaLM
from mambakit.models import ModelState

CONFIG = MambaConfig(d_model=8, n_layer=2, vocab_size=20, d_state=4)


@pytest.fixture
def state():
    torch.manual_seed(0)
    return MambaLM(CONFIG)(torch.randint(20, (3, 5))).state


def tensors(state):
    return [tensor for layer in state.layers for tensor in layer]


def test_its_tensors_have_the_promised_shapes(state):
    assert len(state) == 3
    assert [layer.conv.shape for layer in state.layers] == [(3, 16, 3)] * 2
    assert [layer.ssm.shape for layer in state.layers] == [(3, 16, 4)] * 2
    assert state.nbytes == 2 * 3 * 16 * (3 + 4) * 4


@pytest.mark.parametrize(
    ("index", "rows"),
    [
        (1, [1]),
        (-1, [2]),
        (slice(1, None), [1, 2]),
        (torch.tensor([2, 0, 0]), [2, 0, 0]),
        (torch.tensor([True, False, True]), [0, 2]),
    ],
)
def test_rows_can_be_taken(state, index, rows):
    for taken, whole in zip(tensors(state[index]), tensors(state), strict=True):
        assert_close(taken, whole[rows], rtol=0, atol=0)


@pytest.mark.parametrize("index", [3, -4])
def test_a_row_that_is_not_there_is_refused(state, index):
    with pytest.raises(IndexError, match=f"sequence {index} of 3 does not exist"):
        state[index]


def test_it_can_be_walked_through(state):
    assert [len(row) for row in state] == [1, 1, 1]


def test_detach_cuts_the_graph(state):
    assert all(tensor.requires_grad for tensor in tensors(state))
    assert not any(tensor.requires_grad for tensor in tensors(state.detach()))


def test_a_shorter_dtype_leaves_the_scans_state_alone(state):
    for layer in state.to(dtype=torch.bfloat16).layers:
        assert (layer.conv.dtype, layer.ssm.dtype) == (torch.bfloat16, torch.float32)
    for layer in state.to(device="meta").layers:
        assert (layer.conv.device.type, layer.ssm.device.type) == ("meta", "meta")


def test_it_never_changes(state):
    with pytest.raises(dataclasses.FrozenInstanceError):
        state.layers = ()


def test_it_is_a_pytree(state):
    leaves, structure = pytree.tree_flatten(state)
    assert len(leaves) == 4
    doubled = pytree.tree_unflatten([2 * leaf for leaf in leaves], structure)
    assert isinstance(doubled, ModelState)
    assert_close(doubled.layers[1].ssm, 2 * state.layers[1].ssm)
