"""Devices without float64 are never asked for it.

A machine without such a device has fakes for its tensors: they have a device, a shape and a
dtype, and compute nothing. PyTorch lets them be on a device of the type ``lazy``.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mambakit.generation import SamplingRules, sampling
from mambakit.generation.chance import RowChance
from mambakit.generation.sampling import exact_device, pick
from mambakit.generation.speculative import _probabilities

pytestmark = pytest.mark.cpu


@pytest.fixture(autouse=True)
def without(monkeypatch):
    monkeypatch.setattr(sampling, "_WITHOUT_FLOAT64", {"mps", "lazy"})


class NoFloat64(TorchDispatchMode):
    """Refuse what Apple's GPUs refuse."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.device.type == "lazy":
                assert leaf.dtype != torch.float64, func
        return out


def test_the_refusal_refuses():
    with FakeTensorMode(), NoFloat64(), pytest.raises(AssertionError):
        torch.rand(2, device="lazy").double()


@pytest.mark.parametrize("u", [True, False])
@pytest.mark.parametrize("rules", [{}, {"top_k": 3, "top_p": 0.9, "min_p": 0.1}])
def test_a_token_is_drawn_without_it(u, rules):
    with FakeTensorMode(), NoFloat64():
        logits = torch.rand(2, 8, device="lazy")
        chance = torch.rand(2, dtype=torch.float64) if u else None
        tokens = SamplingRules(**rules).choose(logits, None, chance)
        p = _probabilities(SamplingRules(**rules), logits, None)
        drawn = pick(p, chance)
    assert (tokens.device.type, tokens.dtype) == ("lazy", torch.int64)
    assert (p.device.type, p.dtype, drawn.device.type) == ("cpu", torch.float64, "cpu")


def test_chance_is_the_same_and_stays_where_it_can_be():
    keys = [(1, 0), (2, 5)]
    here, there = RowChance(keys, "cpu").draw(), RowChance(keys, "mps").draw()
    assert (there.device.type, there.dtype) == ("cpu", torch.float64)
    assert_close(there, here, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["cpu", "cuda", "cuda:1", "meta"])
def test_other_devices_compute_it_themselves(name):
    device = torch.device(name)
    assert exact_device(device) is device
