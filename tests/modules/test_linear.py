"""Laws of the linear layer: torch's values, whichever dtype the product runs in."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from mambakit.modules import Linear, linear as module
from mambakit.modules.linear import gains_from_float32

SHORT = [torch.bfloat16, torch.float16]


@pytest.fixture(params=[False, True], ids=["emulated", "in hardware"])
def able(request, monkeypatch):
    """A CPU with and without instructions for the short dtypes, whatever this one has."""
    monkeypatch.setattr(module, "in_hardware", lambda dtype, device: request.param)
    return request.param


def make(rows, dtype, *, bias=True, weight_dtype=None):
    torch.manual_seed(0)
    layer = Linear(24, 40, bias=bias, dtype=weight_dtype or dtype)
    x = torch.randn(2, rows // 2, 24).to(dtype).requires_grad_()
    return layer, x


def gradients(y, layer, x):
    source = torch.Generator().manual_seed(1)
    dy = torch.randn(y.shape, generator=source, device="cpu").to(y)
    return torch.autograd.grad(y, (x, *layer.parameters()), dy)


def exact(layer, x, dtype):
    """The layer in float64, and its gradients."""
    x = x.detach().double().requires_grad_()
    wide = torch.nn.Linear(24, 40, bias=layer.bias is not None, dtype=torch.float64)
    wide.load_state_dict(layer.state_dict())
    y = wide(x)
    source = torch.Generator().manual_seed(1)
    dy = torch.randn(y.shape, generator=source, device="cpu").to(y.device, dtype)
    return y, torch.autograd.grad(y, (x, *wide.parameters()), dy.double())


@pytest.mark.parametrize(
    ("rows", "dtype", "device", "able", "gains"),
    [
        (16, torch.bfloat16, "cpu", False, True),
        (2048, torch.float16, "cpu", False, True),
        (15, torch.bfloat16, "cpu", False, False),
        (2048, torch.bfloat16, "cpu", True, False),
        (2048, torch.float32, "cpu", False, False),
        (2048, torch.float64, "cpu", False, False),
        (2048, torch.bfloat16, "cuda", False, False),
    ],
)
def test_float32_is_taken_where_it_gains(rows, dtype, device, able, gains):
    assert gains_from_float32(rows, dtype, device, able) is gains


@pytest.mark.parametrize("dtype", [*SHORT, torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [2, 64])
@pytest.mark.parametrize("bias", [True, False])
def test_value_and_gradients_are_the_exact_ones_rounded(able, rows, dtype, bias):
    layer, x = make(rows, dtype, bias=bias)
    y = layer(x)
    expected, wanted = exact(layer, x, dtype)
    assert_close(y, expected.to(dtype))
    for got, want in zip(gradients(y, layer, x), wanted, strict=True):
        assert got.dtype == dtype
        assert_close(got, want.to(dtype))


@pytest.mark.parametrize("dtype", SHORT)
def test_the_error_is_no_larger_than_that_of_the_short_product(monkeypatch, dtype):
    monkeypatch.setattr(module, "in_hardware", lambda dtype, device: False)
    layer, x = make(64, dtype)
    y, short = layer(x), F.linear(x, layer.weight, layer.bias)
    value, grads = exact(layer, x, dtype)
    pairs = zip(
        (y, *gradients(y, layer, x)),
        (short, *gradients(short, layer, x)),
        (value, *grads),
        strict=True,
    )
    for ours, theirs, truth in pairs:
        error = (ours.double() - truth).abs().max()
        # a single rounding of the largest number, where the other is as good
        rounding = torch.finfo(dtype).eps / 2 * truth.abs().max()
        assert error <= torch.maximum((theirs.double() - truth).abs().max(), rounding)


@pytest.mark.parametrize("stream", [torch.float32, torch.bfloat16])
def test_under_autocast_dtypes_are_torchs_own(able, stream):
    layer, x = make(64, stream, weight_dtype=torch.float32)
    plain = torch.nn.Linear(24, 40)
    plain.load_state_dict(layer.state_dict())
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        y, expected = layer(x), plain(x)
        inside = gradients(y, layer, x)
        y, expected = layer(x), plain(x)
    assert y.dtype == expected.dtype == torch.bfloat16
    # torch rounds the factors as well
    assert_close(y, expected, rtol=2e-2, atol=2e-2)
    got, wanted = gradients(y, layer, x), gradients(expected, plain, x)
    assert_close(inside, got)
    for a, b in zip(got, wanted, strict=True):
        assert a.dtype == b.dtype
        assert (a - b).abs().max() <= 2e-2 * b.abs().max()


def test_autocast_leaves_float64_alone(able):
    layer, x = make(64, torch.float64)
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        assert layer(x).dtype == torch.float64


@pytest.mark.parametrize("frozen", ["input", "weight"])
def test_what_is_frozen_gets_no_gradient(able, frozen):
    layer, x = make(64, torch.bfloat16, bias=False)
    (x if frozen == "input" else layer.weight).requires_grad_(False)
    layer(x).sum().backward()
    assert (x.grad is None) == (frozen == "input")
    assert (layer.weight.grad is None) == (frozen == "weight")


def test_a_mixture_of_dtypes_is_refused_as_torch_does(able):
    layer, x = make(64, torch.bfloat16, weight_dtype=torch.float32)
    with pytest.raises(RuntimeError, match="same dtype"):
        layer(x)


def test_second_derivatives_are_those_of_the_plain_product(monkeypatch):
    monkeypatch.setattr(module, "in_hardware", lambda dtype, device: False)
    layer, x = make(64, torch.bfloat16, bias=False)

    def second(y):
        (first,) = torch.autograd.grad(y.float().square().sum(), x, create_graph=True)
        return torch.autograd.grad(first.float().square().sum(), layer.weight)[0]

    wanted = second(F.linear(x.float(), layer.weight.float())).float()
    bound = 0.02 * wanted.abs().max().item()
    assert_close(second(layer(x)).float(), wanted, rtol=0.05, atol=bound)


@pytest.mark.compiles
def test_compiled_it_is_one_graph(able):
    layer, x = make(64, torch.bfloat16)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert_close(compiled(x), layer(x))
    assert_close(gradients(compiled(x), layer, x), gradients(layer(x), layer, x))


def test_on_meta_it_gives_shapes():
    layer = Linear(8, 3, device="meta")
    assert layer(torch.empty(2, 8, device="meta")).shape == (2, 3)
