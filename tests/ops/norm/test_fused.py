"""RMSNorm in one pass as registered operators, and when they serve."""

import pytest
import torch

from mambakit.ops import _backends
from mambakit.ops.norm import add_rms_norm, cuda, rms_norm, serves


@pytest.fixture
def registered(emulated):
    """The operators on the device, which for this test may be the emulator's processor."""
    if emulated.type == "cuda":
        yield emulated
        return
    with torch.library._scoped_library("mambakit", "IMPL") as library:
        library.impl("rms_norm", cuda.rms_norm, "CPU")
        library.impl("add_rms_norm", cuda.add_rms_norm, "CPU")
        yield emulated


@pytest.mark.compiles
@pytest.mark.parametrize("stream", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 5, 24), (2, 0, 24)])
def test_registration_is_sound(registered, stream, shape):
    x, gain = torch.randn(shape, dtype=stream), torch.randn(24, dtype=torch.bfloat16)
    torch.library.opcheck(rms_norm, (x, gain, 1e-5))
    torch.library.opcheck(add_rms_norm, (x, torch.randn(shape).half(), gain, 1e-5))


def test_a_gradient_is_refused(registered):
    x, gain = torch.randn(2, 8), torch.randn(8, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"^RMSNorm: its operator in one pass has no grad"):
        rms_norm(x, gain, 1e-5)
    with torch.no_grad():
        assert torch.equal(rms_norm(x, gain, 1e-5), add_rms_norm(x, x * 0, gain, 1e-5)[1])


# Who may be served on a GPU, if its kernels can be compiled, which these tests make sure of.
@pytest.mark.parametrize(
    ("x", "gain", "addend", "served"),
    [
        ((2, 8), torch.bfloat16, None, True),
        ((2, 8), torch.float32, (2, 8), True),
        ((2, 8), torch.float64, None, False),
        ((2, 8), torch.float32, (1, 8), False),
        ((2, 9), torch.float32, None, False),
        ((), torch.float32, None, False),
    ],
)
def test_who_is_served(device, fused, x, gain, addend, served):
    x, gain = torch.randn(x), torch.randn(8, dtype=gain)
    more = None if addend is None else torch.randn(addend)
    assert serves(x, gain, more) == (served and device.type == "cuda")


def test_who_asks_for_a_derivative_is_not_served(device, fused):
    x, gain = torch.randn(2, 8), torch.nn.Parameter(torch.randn(8))
    assert not serves(x, gain)
    with torch.no_grad():
        assert serves(x, gain) == (device.type == "cuda")
        with torch.autograd.forward_ad.dual_level():
            assert not serves(x, gain)
    gain.requires_grad_(False)
    assert serves(x, gain) == serves(x, gain, x) == (device.type == "cuda")
    assert not serves(x, gain, x.clone().requires_grad_())
    inside = []
    torch.func.vmap(lambda row: inside.append(serves(row, gain)) or row)(x)
    assert inside == [False]


@pytest.mark.compiles
def test_a_compiler_is_not_served(fused):
    @torch.compile(fullgraph=True, backend="eager")
    def run(x, gain):
        return x + 1 if serves(x, gain) else x

    x = torch.randn(2, 8)
    assert torch.equal(run(x, torch.randn(8)), x)


def test_a_tensor_of_another_class_is_not_served(fused):
    class Other(torch.Tensor):
        pass

    assert not serves(torch.randn(2, 8).as_subclass(Other), torch.randn(8))


def test_without_kernels_nobody_is_served(monkeypatch):
    monkeypatch.setattr(_backends, "_why_not_cuda", lambda index: "there is no compiler")
    assert not serves(torch.randn(2, 8), torch.randn(8))
