"""RMSNorm: divide a vector by its root mean square."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mambakit.ops.norm import add_rms_norm, rms_norm, serves

from ._checks import check_vectors
from ._parameters import exempt_from_decay


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square()
    return (square / x.shape[-1] + eps).rsqrt()


class _RMSNormOnCPU(torch.autograd.Function):
    """``F.rms_norm`` with a backward that takes less than half the time.

    Both reductions of the gradient are products of one matrix, ``dy * x``, with a vector. The
    backward takes its own derivatives, so that second ones are right.
    """

    @staticmethod
    def forward(x: Tensor, gain: Tensor, eps: float) -> Tensor:
        return (x * _inverse_rms(x, eps)).mul_(gain)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: Tensor) -> None:
        x, gain, ctx.eps = inputs
        ctx.save_for_backward(x, gain)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, gain = ctx.saved_tensors
        m = x.shape[-1]
        rows, dy = x.reshape(-1, m), grad.reshape(-1, m)
        r = _inverse_rms(rows, ctx.eps)
        product = dy * rows
        dgain = product.T.mv(r[:, 0])
        along = product.mv(gain)[:, None] * r.pow(3) / -m
        dx = (dy * gain).mul_(r).addcmul_(rows, along)
        return dx.view_as(x), dgain, None


class RMSNorm(nn.Module):
    """Scale each vector to root mean square 1, then each of its elements by a learnt gain.

        y = gain * x / sqrt(mean(x^2) + eps)

    Args:
        m: Width of the vectors.
        eps: Added to the mean square, so that a vector of zeros gives zeros.
        device: Where the gain is made.
        dtype: Dtype of the gain; ``None`` means torch's default.

    The arithmetic is at least float32, whatever ``x`` is; ``y`` comes back in the dtype of
    the gain (``weight``), which is the dtype that the layers after it compute in.

    Raises:
        ValueError: ``m`` is less than 1 or ``eps`` is negative.

    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019, equation 4.

    Example:
        >>> norm = RMSNorm(8)
        >>> y = norm(100 * torch.randn(2, 5, 8))
        >>> torch.testing.assert_close(y.square().mean(-1), torch.ones(2, 5))
    """

    def __init__(
        self,
        m: int,
        eps: float = 1e-5,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if m < 1:
            raise ValueError(f"RMSNorm: m must be at least 1, got {m}")
        if eps < 0:
            raise ValueError(f"RMSNorm: eps must not be negative, got {eps}")
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(m, device=device, dtype=dtype))
        exempt_from_decay(self.weight)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        exempt_from_decay(self.weight)  # a deep copy of a parameter loses its marks

    def forward(self, x: Float[Tensor, "*batch m"]) -> Float[Tensor, "*batch m"]:
        """Return ``x`` normalised over its last axis, in the dtype of the gain.

        Raises:
            ValueError: ``x`` is no tensor of floats of shape (..., m) where the gain is.
        """
        gain = self.weight
        check_vectors("RMSNorm", x, gain)
        if serves(x, gain):
            return rms_norm(x, gain, self.eps)
        accumulate = torch.promote_types(x.dtype, torch.float32)
        x, wide = x.to(accumulate), gain.to(accumulate)
        if x.device.type == "cpu" and not torch.compiler.is_compiling():
            y = _RMSNormOnCPU.apply(x, wide, self.eps)
        else:
            y = F.rms_norm(x, gain.shape, wide, self.eps)
        return y.to(gain.dtype)

    def after_sum(
        self, x: Float[Tensor, "*batch m"], addend: Float[Tensor, "*batch m"]
    ) -> tuple[Float[Tensor, "*batch m"], Float[Tensor, "*batch m"]]:
        """Return ``x + addend`` and that normalised, where a GPU can in one pass over memory.

        Example:
            >>> norm, x, y = RMSNorm(8), torch.randn(5, 8), torch.randn(5, 8)
            >>> total, normalised = norm.after_sum(x, y)
            >>> torch.testing.assert_close(total, x + y)
            >>> torch.testing.assert_close(normalised, norm(x + y))
        """
        if serves(x, self.weight, addend):
            return add_rms_norm(x, addend, self.weight, self.eps)
        x = x + addend
        return x, self(x)

    def extra_repr(self) -> str:
        """Say the width and ``eps`` where the module is printed."""
        return f"{self.weight.numel()}, eps={self.eps}"
