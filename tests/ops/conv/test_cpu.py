"""The compiled convolution, in the library of every instruction set that this machine runs."""

import pytest
import torch

from mambakit.ops import _native
from mambakit.ops.conv import cpu, reference
from tests.ops import packs

pytestmark = pytest.mark.cpu

# Around the block of 8 steps, the strip of 128 steps, the block of 512 channels, every width of
# vector, and windows longer than the sequence.
SIZES = [
    (2, 9, 3, 4),
    (1, 129, 17, 4),
    (1, 300, 530, 4),
    (2, 2, 33, 4),
    (1, 0, 5, 4),
    (2, 131, 8, 1),
    (1, 40, 1, 2),
    (1, 300, 5, 40),
    (0, 4, 3, 4),
]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(scope="session", params=_native.runnable())
def library(request):
    return _native.open_library(request.param)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_equals_the_reference(library, draw, assert_near, dtype, silu, size):
    b, l, d, w = size
    inputs = draw(*size, dtype=dtype)
    dy, dlast = torch.randn(b, l, d, dtype=dtype), torch.randn(b, d, w - 1, dtype=dtype)

    exact = [t.double().requires_grad_() for t in inputs]
    wanted = reference.conv(*exact, silu)
    gradients = torch.autograd.grad(wanted, exact, (dy.double(), dlast.double()))

    y, last = cpu.forward_in(library, *inputs, silu)
    assert_near(y, wanted[0])
    assert torch.equal(last.double(), wanted[1])
    got = cpu.backward_in(library, dy, dlast, *inputs, silu)
    for name, g, exact_g in zip(("x", "weight", "bias", "state"), got, gradients, strict=True):
        scale = exact_g.abs().max() if exact_g.numel() else 1.0
        assert_near(g / scale, exact_g / scale, message=f"gradient of {name}")


@pytest.mark.parametrize("lengths", [[5] * 60, [300, 1, 7, 128, 2], [1] * 9], ids=str)
@pytest.mark.parametrize(("d", "w"), [(530, 4), (17, 1), (3, 40)])
def test_a_pack_equals_the_reference(library, draw, assert_near, lengths, d, w):
    cu_seqlens = packs.ends(lengths)
    x, weight, bias, _ = draw(1, sum(lengths), d, w)
    state = torch.randn(len(lengths), w - 1, d, dtype=x.dtype).mT
    inputs = [t.requires_grad_() for t in (x, weight, bias, state)]
    wanted = reference.conv(*inputs, True, cu_seqlens=cu_seqlens)
    given = torch.randn_like(x), torch.randn_like(state)
    gradients = torch.autograd.grad(wanted, inputs, given)
    inputs = [t.detach() for t in inputs]
    y, last = cpu.forward_in(library, *inputs, True, cu_seqlens)
    assert_near(y, wanted[0])
    assert torch.equal(last, wanted[1])
    got = cpu.backward_in(library, *given, *inputs, True, cu_seqlens)
    for name, g, exact in zip(("x", "weight", "bias", "state"), got, gradients, strict=True):
        assert_near(g, exact, message=f"gradient of {name}")


def test_a_lack_of_memory_is_one_sentence(monkeypatch, library, draw):
    monkeypatch.setattr(cpu, "_functions", lambda _: (lambda *_: False,) * 2)
    x, weight, bias, state = draw()
    with pytest.raises(RuntimeError, match=r"^causal_conv1d: there is not enough memory"):
        cpu.forward_in(library, x, weight, bias, state, False)
    with pytest.raises(RuntimeError, match=r"^causal_conv1d: there is not enough memory"):
        cpu.backward_in(library, x, None, x, weight, bias, state, False)


def test_half_precision_is_rounded_to_nearest_even(library):
    """Every number of float16 and bfloat16 through a tap of 1, and through one of 1 + 2^-12."""
    one = torch.ones(1, 1)
    for dtype in (torch.float16, torch.bfloat16):
        every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
        if dtype is torch.bfloat16:
            # the kernel flushes denormals, as eager operations on bfloat16 do not
            every = every[(every.abs() >= torch.finfo(dtype).tiny) | (every == 0)]
        x = every[~every.isnan()].reshape(1, -1, 1)
        assert torch.equal(cpu.forward_in(library, x, one, None, None, False)[0], x)

        scaled = cpu.forward_in(library, x, one * (1 + 2**-12), None, None, False)[0]
        wanted = (x.float() * (1 + 2**-12)).to(dtype)
        large = wanted.abs() >= torch.finfo(dtype).tiny
        assert torch.equal(scaled[large], wanted[large])


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_holds_at_the_ends(library, dtype):
    x = torch.tensor([-1e4, -200.0, -90.0, -88.0, -20.0, 0.0, 20.0, 90.0, 1e4], dtype=dtype)
    x = x.reshape(1, -1, 1).requires_grad_()
    one = torch.ones(1, 1, dtype=torch.float64)
    y, _ = cpu.forward_in(library, x.detach(), one, None, None, True)
    wanted = torch.nn.functional.silu(x.double())
    atol = 1e-30 if torch.finfo(dtype).tiny < 1e-30 else torch.finfo(dtype).smallest_normal
    torch.testing.assert_close(y.double(), wanted.detach(), rtol=1e-2, atol=atol)
    dy = torch.ones_like(x)
    dx = cpu.backward_in(library, dy, None, x.detach(), one, None, None, True)[0]
    (slope,) = torch.autograd.grad(wanted.sum(), x)
    torch.testing.assert_close(dx, slope, rtol=1e-2, atol=1e-6)


def test_infinities_are_pytorchs(library):
    x = torch.tensor([torch.inf, -torch.inf]).reshape(2, 1, 1)
    y, _ = cpu.forward_in(library, x, torch.ones(1, 1), None, None, True)
    torch.testing.assert_close(y, torch.nn.functional.silu(x), equal_nan=True)


def test_slices_of_a_wider_tensor_are_not_copied():
    wide = torch.randn(2, 5, 16)
    assert cpu._rows(wide[..., 8:], wide.dtype).data_ptr() == wide[..., 8:].data_ptr()


def test_the_state_that_comes_out_goes_in_without_a_copy(library, draw):
    _, last = cpu.forward_in(library, *draw(dtype=torch.float32), True)
    rows = cpu._state_rows(last, last.dtype)
    assert rows is not None
    assert rows.data_ptr() == last.data_ptr()
