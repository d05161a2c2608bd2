"""A linear layer that computes in float32 where the CPU would emulate the short dtype."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ._hardware import in_hardware

# Below this many rows the weight's conversion costs more than the float32 product saves.
# Measured at 130M: a projection of the mixer gains from 8 rows on, the output layer, whose
# float32 copy is 154 MB, from between 32 and 64 on; at 16 gains and loss of a step balance.
_ROWS = 16


def autocasts(device: str) -> bool:
    """Say whether autocast is on for the device's type; torch refuses to answer for meta."""
    return device != "meta" and torch.is_autocast_enabled(device)


def product_dtype(input: Tensor, weight: Tensor) -> torch.dtype:
    """Return the dtype that ``F.linear`` computes in, autocast considered."""
    device = input.device.type
    if autocasts(device) and torch.float64 not in (input.dtype, weight.dtype):
        return torch.get_autocast_dtype(device)
    return input.dtype


def gains_from_float32(rows: int, dtype: torch.dtype, device: str, able: bool) -> bool:
    """Say whether a product is faster in float32 than in ``dtype``.

    Args:
        rows: Vectors that the weight multiplies.
        dtype: Dtype of the product.
        device: The device's type.
        able: Whether the device has instructions for that dtype.

    Example:
        >>> gains_from_float32(2048, torch.bfloat16, "cpu", able=False)
        True
        >>> gains_from_float32(1, torch.bfloat16, "cpu", able=False)
        False
    """
    short = dtype in (torch.bfloat16, torch.float16)
    return short and device == "cpu" and not able and rows >= _ROWS


class _Float32Product(torch.autograd.Function):
    """``F.linear`` in float32, rounded once; the tensors it keeps are the short ones."""

    @staticmethod
    def forward(
        input: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            wide = None if bias is None else bias.float()
            return F.linear(input.float(), weight.float(), wide).to(dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        input, weight, bias, _ = inputs
        ctx.save_for_backward(input, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        dinput = dweight = dbias = None
        with torch.autocast("cpu", enabled=False):
            rows = grad.flatten(0, -2).float()
            if ctx.needs_input_grad[0]:
                dinput = (rows @ weight.float()).view_as(input).to(input.dtype)
            if ctx.needs_input_grad[1]:
                dweight = (rows.T @ input.flatten(0, -2).float()).to(weight.dtype)
            if ctx.needs_input_grad[2]:
                dbias = rows.sum(0).to(ctx.bias_dtype)
        return dinput, dweight, dbias, None


def linear(
    input: Float[Tensor, "*batch k"],
    weight: Float[Tensor, "j k"],
    bias: Float[Tensor, " j"] | None = None,
) -> Float[Tensor, "*batch j"]:
    """Return ``weight input + bias``, as ``Linear`` says."""
    dtype = product_dtype(input, weight)
    if (
        dtype in (torch.bfloat16, torch.float16)
        and not torch.compiler.is_compiling()
        # without autocast torch refuses a mixture, and in its own words
        and (autocasts(input.device.type) or weight.dtype == dtype)
        and gains_from_float32(
            input.shape[:-1].numel(),
            dtype,
            input.device.type,
            in_hardware(dtype, input.device),
        )
    ):
        return _Float32Product.apply(input, weight, bias, dtype)
    return F.linear(input, weight, bias)


class Linear(nn.Linear):
    """Map each vector by a matrix, fast also where the CPU lacks the dtype's instructions.

        y = weight input + bias

    On a CPU without bfloat16 (or float16) instructions PyTorch's product in that dtype, be it
    the parameters' own or autocast's, takes longer than in float32. There
    this layer computes products of 16 rows or more in float32, forward and backward, and
    rounds the result: ``y`` has the dtype that ``nn.Linear`` gives, and an error no larger.
    Fewer rows, other dtypes, other devices and graphs of ``torch.compile`` and
    ``torch.export`` are ``nn.Linear``'s own.

    Example:
        >>> layer = Linear(8, 3, dtype=torch.bfloat16)
        >>> x = torch.randn(20, 8, dtype=torch.bfloat16)
        >>> exact = x.double() @ layer.weight.double().T + layer.bias.double()
        >>> torch.testing.assert_close(layer(x), exact.bfloat16())
    """

    def forward(self, input: Float[Tensor, "*batch k"]) -> Float[Tensor, "*batch j"]:
        """Return ``weight input + bias``."""
        return linear(input, self.weight, self.bias)
