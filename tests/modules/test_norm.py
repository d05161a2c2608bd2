"""Laws of RMSNorm."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from mambakit.modules import RMSNorm


def gradients_of(y, inputs):
    source = torch.Generator().manual_seed(1)
    dy = torch.randn(y.shape, generator=source, device="cpu").to(y)
    return torch.autograd.grad(y, inputs, dy)


def test_it_is_the_equation():
    torch.manual_seed(0)
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    norm = RMSNorm(8, eps=0.1, dtype=torch.float64)
    torch.nn.init.normal_(norm.weight)
    expected = norm.weight * x / (x.square().mean(-1, keepdim=True) + 0.1).sqrt()
    assert_close(norm(x), expected)


def test_scale_of_the_input_does_not_matter():
    torch.manual_seed(0)
    x = torch.randn(3, 16)
    norm = RMSNorm(16, eps=1e-12)
    assert_close(norm(1000 * x), norm(x))


def test_a_vector_of_zeros_stays_zeros():
    assert_close(RMSNorm(4)(torch.zeros(2, 4)), torch.zeros(2, 4))


@pytest.mark.parametrize("stream", [torch.float32, torch.bfloat16])
def test_arithmetic_is_float32_and_the_result_has_the_dtype_of_the_gain(stream):
    torch.manual_seed(0)
    x = torch.randn(2, 5, 64).to(stream)
    norm = RMSNorm(64, dtype=torch.bfloat16)
    y = norm(x)
    assert y.dtype == torch.bfloat16
    assert_close(y, RMSNorm(64)(x.float()).bfloat16(), rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(2, 5, 48), (48,), (2, 0, 48)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_value_and_gradients_are_those_of_torchs_own(shape, dtype):
    torch.manual_seed(0)
    norm = RMSNorm(48, dtype=dtype)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    inputs = (x, norm.weight)
    wide = torch.promote_types(dtype, torch.float32)
    expected = F.rms_norm(x.to(wide), (48,), norm.weight.to(wide), 1e-5).to(dtype)
    assert_close(norm(x), expected)
    for got, wanted in zip(
        gradients_of(norm(x), inputs), gradients_of(expected, inputs), strict=True
    ):
        assert got.dtype == dtype
        assert_close(got, wanted)


@pytest.mark.parametrize("addend", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stream", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("no_grad", [False, True])
def test_after_a_sum_it_is_the_sums(stream, addend, no_grad):
    torch.manual_seed(0)
    x, y, norm = torch.randn(2, 5, 48).to(stream), torch.randn(2, 5, 48).to(addend), RMSNorm(48)
    with torch.set_grad_enabled(not no_grad):
        total, normalised = norm.after_sum(x, y)
        assert total.dtype == torch.promote_types(stream, addend)
        assert torch.equal(total, x + y)
        assert_close(normalised, norm(total), rtol=0, atol=0)


def test_the_layout_of_the_input_does_not_matter():
    torch.manual_seed(0)
    norm, x = RMSNorm(8), torch.randn(3, 8, 5, requires_grad=True)
    strided = norm(x.transpose(1, 2))
    dense = norm(x.transpose(1, 2).contiguous())
    assert_close(strided, dense)
    assert_close(gradients_of(strided, (x,)), gradients_of(dense, (x,)))


def test_first_and_second_derivatives():
    torch.manual_seed(0)
    norm = RMSNorm(5, eps=0.1, dtype=torch.float64)
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    gain = torch.randn(5, dtype=torch.float64, requires_grad=True)

    def call(x, gain):
        return torch.func.functional_call(norm, {"weight": gain}, (x,))

    assert torch.autograd.gradcheck(call, (x, gain))
    assert torch.autograd.gradgradcheck(call, (x, gain))


def test_autocast_changes_neither_value_nor_gradients():
    torch.manual_seed(0)
    norm, x = RMSNorm(8), torch.randn(3, 5, 8, requires_grad=True)
    expected = norm(x)
    wanted = gradients_of(expected, (x, norm.weight))
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        y = norm(x)
        got = gradients_of(y, (x, norm.weight))
    assert_close(y, expected, rtol=0, atol=0)
    assert_close(got, wanted, rtol=0, atol=0)


@pytest.mark.compiles
def test_compiled_it_is_the_same():
    torch.manual_seed(0)
    norm, x = RMSNorm(8), torch.randn(3, 5, 8, requires_grad=True)
    compiled = torch.compile(norm, fullgraph=True, backend="aot_eager")
    inputs = (x, norm.weight)
    assert_close(compiled(x), norm(x))
    assert_close(gradients_of(compiled(x), inputs), gradients_of(norm(x), inputs))


def test_the_gain_is_exempt_from_weight_decay():
    assert RMSNorm(4).weight._no_weight_decay


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0,), "RMSNorm: m must be at least 1, got 0"),
        ((4, -1.0), "RMSNorm: eps must not be negative, got -1.0"),
    ],
)
def test_bad_values_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        RMSNorm(*arguments)
