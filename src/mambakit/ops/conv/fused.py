"""The causal convolution as a registered operator: schema, fake, kernels, gradient.

The gradient is an ``autograd.Function`` under the Autograd key, which costs a call far less
than ``torch.library.register_autograd``: one generated token makes a call for every layer.

The operators are private to the package and check nothing: shapes, dtypes and devices are
checked once, in ``causal_conv1d``, and a kernel called directly trusts what it is given.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .._autograd import any_requires_grad, refuse_tangents, refuse_transforms
from .._packing import bounds, kept_for_backward
from . import cpu, cuda

_INPUTS = "Tensor x, Tensor weight, Tensor? bias, Tensor? state, Tensor? cu_seqlens, bool silu"

torch.library.define("mambakit::causal_conv1d", f"({_INPUTS}) -> (Tensor y, Tensor last)")
torch.library.define(
    "mambakit::causal_conv1d_backward",
    f"(Tensor dy, Tensor? dlast, {_INPUTS})"
    " -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dstate)",
)

# Writes the gradient of x where dx is.
torch.library.define(
    "mambakit::causal_conv1d_backward.into",
    f"(Tensor dy, Tensor? dlast, {_INPUTS}, *, Tensor(a!) dx)"
    " -> (Tensor dweight, Tensor dbias, Tensor dstate)",
)

_forward = torch.ops.mambakit.causal_conv1d.default
_backward = torch.ops.mambakit.causal_conv1d_backward.default


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    silu: bool,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the kernel for the device of ``x``; shapes as in ``causal_conv1d``, checked there."""
    y, last = _forward(x, weight, bias, state, cu_seqlens, silu)
    return y, last


def _state_like(t: Tensor, b: int, d: int, w: int) -> Tensor:
    """Make a state whose channels are neighbours in memory, as they are in ``x``."""
    return t.new_empty(b, w - 1, d).transpose(1, 2)


@torch.library.register_fake("mambakit::causal_conv1d")
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    rows = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return x.new_empty(x.shape), _state_like(x, rows, x.shape[2], weight.shape[1])


@torch.library.register_fake("mambakit::causal_conv1d_backward")
def _fake_backward(
    dy: Tensor,
    dlast: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape),
        weight.new_empty(weight.shape),
        x.new_empty(0) if bias is None else bias.new_empty(bias.shape),
        x.new_empty(0)
        if state is None
        else _state_like(state, state.shape[0], state.shape[1], weight.shape[1]),
    )


@torch.library.register_fake("mambakit::causal_conv1d_backward.into")
def _(*arguments: Any, dx: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_backward(*arguments)[1:]


def _as_promised(
    x: Tensor, dx: Tensor, dweight: Tensor, dbias: Tensor | None, dstate: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        dweight,
        x.new_empty(0) if dbias is None else dbias,
        x.new_empty(0) if dstate is None else dstate,
    )


def _implement(key: str, kernels: ModuleType, takes_dx: bool) -> None:
    """Register the ``forward`` and ``backward`` of a module under a dispatch key.

    ``takes_dx`` says that ``backward`` takes ``dx``, room that it uses if it can.
    """

    def run(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        state: Tensor | None,
        cu_seqlens: Tensor | None,
        silu: bool,
    ) -> tuple[Tensor, Tensor]:
        if cu_seqlens is not None:
            bounds("causal_conv1d", cu_seqlens, x.shape[1])
        y, last = kernels.forward(x, weight, bias, state, silu, cu_seqlens=cu_seqlens)
        return y, last

    def run_backward(
        dy: Tensor,
        dlast: Tensor | None,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        state: Tensor | None,
        cu_seqlens: Tensor | None,
        silu: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if cu_seqlens is not None:
            bounds("causal_conv1d", cu_seqlens, x.shape[1])
        found = kernels.backward(dy, dlast, x, weight, bias, state, silu, cu_seqlens=cu_seqlens)
        return found[0], *_as_promised(x, *found)

    def run_backward_into(
        dy: Tensor,
        dlast: Tensor | None,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        state: Tensor | None,
        cu_seqlens: Tensor | None,
        silu: bool,
        *,
        dx: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        if cu_seqlens is not None:
            bounds("causal_conv1d", cu_seqlens, x.shape[1])
        room = {"dx": dx} if takes_dx else {}
        found = kernels.backward(
            dy, dlast, x, weight, bias, state, silu, **room, cu_seqlens=cu_seqlens
        )
        if found[0] is not dx:
            dx.copy_(found[0])
        return _as_promised(x, *found)

    torch.library.impl("mambakit::causal_conv1d", key, run)
    torch.library.impl("mambakit::causal_conv1d_backward", key, run_backward)
    torch.library.impl("mambakit::causal_conv1d_backward.into", key, run_backward_into)


_implement("CPU", cpu, takes_dx=False)
_implement("CUDA", cuda, takes_dx=True)


class _Gradient(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        state: Tensor | None,
        cu_seqlens: Tensor | None,
        silu: bool,
    ) -> tuple[Tensor, Tensor]:
        cu_seqlens = kept_for_backward(cu_seqlens)
        with torch._C._AutoDispatchBelowAutograd():
            y, last = _forward(x, weight, bias, state, cu_seqlens, silu)
        ctx.save_for_backward(x, weight, bias, state, cu_seqlens)
        ctx.silu = silu
        ctx.set_materialize_grads(False)
        return y, last

    @staticmethod
    def backward(
        ctx: Any, dy: Tensor | None, dlast: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, None, None]:
        x, weight, bias, state, cu_seqlens = ctx.saved_tensors
        if dy is None:
            dy = torch.zeros_like(x)
        dx, dweight, dbias, dstate = _backward(
            dy, dlast, x, weight, bias, state, cu_seqlens, ctx.silu
        )
        return (
            dx,
            dweight,
            None if bias is None else dbias,
            None if state is None else dstate,
            None,
            None,
        )


@torch.library.impl("mambakit::causal_conv1d", "Autograd")
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    inputs = (x, weight, bias, state)
    refuse_tangents("causal_conv1d", inputs)
    if torch.is_grad_enabled() and any_requires_grad(inputs):
        refuse_transforms("causal_conv1d")
        return _Gradient.apply(x, weight, bias, state, cu_seqlens, silu)
    with torch._C._AutoDispatchBelowAutograd():
        return _forward(x, weight, bias, state, cu_seqlens, silu)


@torch.library.impl("mambakit::causal_conv1d_backward", "Autograd")
def _(
    dy: Tensor,
    dlast: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inputs = (dy, dlast, x, weight, bias, state)
    refuse_tangents("causal_conv1d", inputs)
    if torch.is_grad_enabled() and any_requires_grad(inputs):
        raise RuntimeError(
            "causal_conv1d: second derivatives exist only with backend='reference'"
        )
    with torch._C._AutoDispatchBelowAutograd():
        return _backward(dy, dlast, x, weight, bias, state, cu_seqlens, silu)
