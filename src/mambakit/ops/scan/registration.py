"""How a scan becomes a registered operator: its schema, its fake kernel and its gradient.

An operator is defined once by name; PyTorch's dispatcher then picks the kernel by device. The
gradient is an ``autograd.Function`` under the Autograd key, which costs a call far less than
``torch.library.register_autograd``: one generated token makes a call for every layer.

The operators are private to the package and check nothing: shapes, dtypes and devices are
checked once, in ``selective_scan``, and a kernel called directly trusts what it is given.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._autograd import any_requires_grad, refuse_tangents

Forward = Callable[..., tuple[Tensor, Tensor, Tensor]]
Backward = Callable[..., Sequence[Tensor | None]]
Scan = Callable[..., tuple[Tensor, Tensor]]

_INPUTS = (
    "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? gate, "
    "Tensor? dt_bias, Tensor? state"
)
_COUNT = 9  # of the inputs
_GRADIENTS = (
    "Tensor dx, Tensor ddt, Tensor dA, Tensor dB, Tensor dC, Tensor dD, Tensor dgate, "
    "Tensor ddt_bias, Tensor dstate"
)


def register(
    name: str,
    kernels: dict[str, tuple[Forward, Backward]],
    checkpoint_shape: Callable[[int, int, int, int], Sequence[int]],
) -> Scan:
    """Register ``mambakit::{name}`` and ``mambakit::{name}_backward``; return the caller.

    ``kernels`` holds a forward and a backward kernel for each dispatch key. They never see an
    empty batch or an empty sequence. ``checkpoint_shape(b, l, d, n)`` is the shape of what
    the forward kernel saves for the backward kernel beside the inputs. The backward kernel
    may leave gradients in the dtype they were summed in and with any strides, and gives
    ``None`` for that of an absent input; the operator promises each in its input's dtype and
    contiguous, as its fake kernel tells a compiler.

    Between the kernels checkpoints lie flat: an axis whose size is 1 for short sequences and
    more for long ones would make a compiler trace both.
    """
    forward_name, backward_name = f"mambakit::{name}", f"mambakit::{name}_backward"
    torch.library.define(
        forward_name,
        f"({_INPUTS}, bool dt_softplus, bool save)"
        " -> (Tensor y, Tensor last, Tensor checkpoints)",
    )
    torch.library.define(
        backward_name,
        f"(Tensor dy, Tensor? dlast, {_INPUTS}, Tensor checkpoints, bool dt_softplus)"
        f" -> ({_GRADIENTS})",
    )
    forward_op = getattr(torch.ops.mambakit, name).default
    backward_op = getattr(torch.ops.mambakit, f"{name}_backward").default

    def outputs(x: Tensor, A: Tensor, save: bool) -> tuple[Tensor, Tensor, Tensor]:
        b, l, d = x.shape
        n = A.shape[1]
        wide = torch.promote_types(x.dtype, torch.float32)
        return (
            x.new_empty(b, l, d),
            x.new_empty((b, d, n), dtype=wide),
            x.new_empty(math.prod(checkpoint_shape(b, l, d, n)) if save else 0, dtype=wide),
        )

    @torch.library.register_fake(forward_name)
    def _(x: Tensor, dt: Tensor, A: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
        return outputs(x, A, rest[-1])

    @torch.library.register_fake(backward_name)
    def _(dy: Tensor, dlast: Tensor | None, *rest: Any) -> list[Tensor]:
        inputs = rest[:_COUNT]
        return [dy.new_empty(0) if t is None else t.new_empty(t.shape) for t in inputs]

    def forward_of_nothing(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
        A, state, save = rest[1], rest[_COUNT - 2], rest[-1]
        y, last, checkpoints = outputs(x, A, save)
        return y, last.zero_() if state is None else last.copy_(state), checkpoints

    def backward_of_nothing(dlast: Tensor | None, *rest: Any) -> list[Tensor | None]:
        gradients = [None if t is None else torch.zeros_like(t) for t in rest[:_COUNT]]
        dstate = gradients[-1]
        if dstate is not None and dlast is not None:
            dstate.copy_(dlast)
        return gradients

    for key, (forward, backward) in kernels.items():
        # the defaults bind this turn's kernels
        def run(x: Tensor, *rest: Any, forward: Forward = forward) -> tuple[Tensor, ...]:
            if x.numel() == 0:
                return forward_of_nothing(x, *rest)
            y, last, checkpoints = forward(x, *rest)
            return y, last, checkpoints.view(-1)

        def run_backward(
            dy: Tensor, dlast: Tensor | None, *rest: Any, backward: Backward = backward
        ) -> list[Tensor]:
            chosen = (
                backward(dy, dlast, *rest) if dy.numel() else backward_of_nothing(dlast, *rest)
            )
            return [
                dy.new_empty(0) if t is None or g is None else g.to(t.dtype).contiguous()
                for t, g in zip(rest, chosen, strict=False)
            ]

        torch.library.impl(forward_name, key, run)
        torch.library.impl(backward_name, key, run_backward)

    class Gradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
            *inputs, dt_softplus, _ = arguments
            with torch._C._AutoDispatchBelowAutograd():
                y, last, checkpoints = forward_op(*inputs, dt_softplus, True)
            ctx.save_for_backward(*inputs, checkpoints)
            ctx.dt_softplus = dt_softplus
            ctx.mark_non_differentiable(checkpoints)
            ctx.set_materialize_grads(False)
            return y, last, checkpoints

        @staticmethod
        def backward(
            ctx: Any, dy: Tensor | None, dlast: Tensor | None, _: None
        ) -> tuple[Tensor | None, ...]:
            *inputs, checkpoints = ctx.saved_tensors
            if dy is None:
                dy = torch.zeros_like(inputs[0])
            gradients = backward_op(dy, dlast, *inputs, checkpoints, ctx.dt_softplus)
            present = (None if t is None else g for t, g in zip(inputs, gradients, strict=True))
            return *present, None, None

    @torch.library.impl(forward_name, "Autograd")
    def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        refuse_tangents("selective_scan", arguments)
        if torch.is_grad_enabled() and any_requires_grad(arguments):
            return Gradient.apply(*arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return forward_op(*arguments)

    @torch.library.impl(backward_name, "Autograd")
    def _(*arguments: Any) -> tuple[Tensor, ...]:
        refuse_tangents("selective_scan", arguments)
        if torch.is_grad_enabled() and any_requires_grad(arguments):
            raise RuntimeError(
                "selective_scan: second derivatives exist only with backend='reference'"
            )
        with torch._C._AutoDispatchBelowAutograd():
            return backward_op(*arguments)

    def scan(*arguments: Any) -> tuple[Tensor, Tensor]:
        y, last, _ = forward_op(*arguments, False)
        return y, last

    return scan
