"""How a scan becomes a registered operator: its schema, its fake kernel and its gradient.

An operator is defined once by name; PyTorch's dispatcher then picks the kernel by device. The
gradient is an ``autograd.Function`` under the Autograd key, which costs a call far less than
``torch.library.register_autograd``: one generated token makes a call for every layer.

The operators are private to the package and check nothing: shapes, dtypes and devices are
checked once, in ``selective_scan``, and a kernel called directly trusts what it is given.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._autograd import any_requires_grad, refuse_tangents, refuse_transforms
from .._packing import bounds, kept_for_backward

Forward = Callable[..., tuple[Tensor, Tensor, Tensor]]
Gradients = Sequence[Tensor | None]
Backward = Callable[..., Gradients]
Scan = Callable[..., tuple[Tensor, Tensor]]


class Kernels(NamedTuple):
    """What one kind of device brings to an operator.

    Beside the inputs ``forward`` saves for ``backward`` one state every ``checkpoint_steps``
    steps of a sequence, in an order of its own; 0 says that it saves none. ``takes_dgate`` says
    that ``backward`` takes ``dgate``, room for the gate's gradient, which it uses if it can.
    Both take the keyword ``cu_seqlens``: ``None``, or where the sequences of a pack lie.
    ``steps_for``, if there is one, may name other steps than ``checkpoint_steps``, by the
    device and dtype of ``x``, the sizes b, l, d and n, and whether it is a pack; ``forward``
    then takes the keyword ``steps``.
    """

    forward: Forward
    backward: Backward
    checkpoint_steps: int
    takes_dgate: bool = False
    steps_for: Callable[[torch.device, torch.dtype, Sequence[int], bool], int] | None = None


_INPUTS = (
    "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? gate, "
    "Tensor? dt_bias, Tensor? state, Tensor? cu_seqlens"
)
_COUNT = 9  # of the inputs that have a gradient: all but the last
_GATE = 6  # its place among them
_GRADIENTS = (
    "Tensor dx, Tensor ddt, Tensor dA, Tensor dB, Tensor dC, Tensor dD, Tensor dgate, "
    "Tensor ddt_bias, Tensor dstate"
)


def _of(kernels: dict[str, Kernels], device: torch.device) -> Kernels:
    # A device without kernels of its own, as that of meta tensors, is taken for the first.
    return kernels.get(device.type.upper(), next(iter(kernels.values())))


def checkpoint_steps(kernels: dict[str, Kernels], device: torch.device) -> int:
    """Return the steps that a call on ``device`` names if it saves no states."""
    return _of(kernels, device).checkpoint_steps


def steps_to_save(
    kernels: dict[str, Kernels], x: Tensor, sizes: Sequence[int], packed: bool
) -> int:
    """Return the steps between two states to be saved, of a scan of sizes b, l, d and n.

    ``x`` is any tensor of its dtype, where it lies. Sizes that are symbols are not asked: that
    would bind a compiled or exported graph to some lengths.
    """
    of = _of(kernels, x.device)
    if of.steps_for is None or not all(type(size) is int for size in sizes):
        return of.checkpoint_steps
    return of.steps_for(x.device, x.dtype, sizes, packed)


def checkpoints(b: int, l: int, sequences: int | None, steps: int) -> int:
    """Return how many states are saved; ``sequences`` is how many a pack holds.

    Sequence k of a pack, from step i to step j, has those from number i // steps + k on:
    ceil((j - i) / steps) of them, which never reach the next one's. So their number follows
    from the sizes alone.
    """
    if steps == 0:
        return 0
    return b * ((l + steps - 1) // steps) if sequences is None else l // steps + sequences


def register(name: str, kernels: dict[str, Kernels]) -> Scan:
    """Register ``mambakit::{name}`` and ``mambakit::{name}_backward``; return the caller.

    ``kernels`` holds a forward and a backward kernel for each dispatch key. They never see an
    empty batch or an empty sequence, and ``cu_seqlens`` only after its values were found right:
    here, for under a compiler nobody could look at them before. The backward kernel may leave
    gradients in the dtype they were summed in and with any strides, and gives ``None`` for that
    of an absent input; the operator promises each in its input's dtype and contiguous, as its
    fake kernel tells a compiler. Its overload ``into`` writes the gate's gradient where
    ``dgate`` is.

    Between the kernels checkpoints lie flat: an axis whose size is 1 for short sequences and
    more for long ones would make a compiler trace both.

    A call names the steps between two checkpoints, also one that saves none: compilers keep
    what they compiled on disk, under what the call says, for later releases to find.
    """
    forward_name, backward_name = f"mambakit::{name}", f"mambakit::{name}_backward"
    arriving = f"Tensor dy, Tensor? dlast, {_INPUTS}, Tensor checkpoints, bool dt_softplus"
    torch.library.define(
        forward_name,
        f"({_INPUTS}, bool dt_softplus, int checkpoint_steps, bool save)"
        " -> (Tensor y, Tensor last, Tensor checkpoints)",
    )
    torch.library.define(backward_name, f"({arriving}) -> ({_GRADIENTS})")
    torch.library.define(
        f"{backward_name}.into",
        f"({arriving}, *, Tensor(a!) dgate) -> ({_GRADIENTS.replace(' Tensor dgate,', '')})",
    )
    forward_op = getattr(torch.ops.mambakit, name).default
    backward_op = getattr(torch.ops.mambakit, f"{name}_backward").default

    def outputs(
        x: Tensor, A: Tensor, cu_seqlens: Tensor | None, steps: int, save: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        b, l, d = x.shape
        n = A.shape[1]
        wide = torch.promote_types(x.dtype, torch.float32)
        rows = b if cu_seqlens is None else cu_seqlens.shape[0] - 1
        # of sizes that may be symbols, on which nothing must branch
        states = checkpoints(b, l, None if cu_seqlens is None else rows, steps) if save else 0
        return (
            x.new_empty(b, l, d),
            x.new_empty((rows, d, n), dtype=wide),
            x.new_empty(states * d * n, dtype=wide),
        )

    @torch.library.register_fake(forward_name)
    def _(x: Tensor, dt: Tensor, A: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
        return outputs(x, A, rest[_COUNT - 3], *rest[-2:])

    @torch.library.register_fake(backward_name)
    def fake_backward(dy: Tensor, dlast: Tensor | None, *rest: Any) -> list[Tensor]:
        inputs = rest[:_COUNT]
        return [dy.new_empty(0) if t is None else t.new_empty(t.shape) for t in inputs]

    @torch.library.register_fake(f"{backward_name}.into")
    def _(*arguments: Any, dgate: Tensor) -> list[Tensor]:
        gradients = fake_backward(*arguments)
        return gradients[:_GATE] + gradients[_GATE + 1 :]

    def forward_of_nothing(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
        A, state = rest[1], rest[_COUNT - 2]
        y, last, kept = outputs(x, A, None, *rest[-2:])
        return y, last.zero_() if state is None else last.copy_(state), kept

    def backward_of_nothing(dlast: Tensor | None, *rest: Any) -> list[Tensor | None]:
        gradients = [None if t is None else torch.zeros_like(t) for t in rest[:_COUNT]]
        dstate = gradients[-1]
        if dstate is not None and dlast is not None:
            dstate.copy_(dlast)
        return gradients

    def as_promised(
        dy: Tensor, inputs: Sequence[Tensor | None], gradients: Sequence[Tensor | None]
    ) -> list[Tensor]:
        return [
            dy.new_empty(0) if t is None or g is None else g.to(t.dtype).contiguous()
            for t, g in zip(inputs, gradients, strict=True)
        ]

    def implement(key: str, of: Kernels) -> None:
        def run(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
            *given, cu_seqlens, dt_softplus, steps, save = rest
            if save and steps != of.checkpoint_steps:
                sizes, packed = (*x.shape, given[1].shape[1]), cu_seqlens is not None
                chosen = steps_to_save(kernels, x, sizes, packed)
                if steps != chosen:
                    either = "" if chosen == of.checkpoint_steps else f" or {chosen}"
                    raise RuntimeError(
                        f"selective_scan: {x.device.type} kernels keep a state every "
                        f"{of.checkpoint_steps}{either} steps here, and this call was compiled "
                        f"by another release or for another device, for {steps}"
                    )
            if cu_seqlens is not None:
                bounds("selective_scan", cu_seqlens, x.shape[1])
            if x.numel() == 0:
                return forward_of_nothing(x, *rest)
            more = {"steps": steps} if save and steps != of.checkpoint_steps else {}
            y, last, kept = of.forward(
                x, *given, dt_softplus, save, cu_seqlens=cu_seqlens, **more
            )
            return y, last, kept.view(-1)

        def gradients_of(
            dy: Tensor, dlast: Tensor | None, *rest: Any, **room: Tensor
        ) -> Gradients:
            if dy.numel() == 0:
                return backward_of_nothing(dlast, *rest)
            *given, cu_seqlens, kept, dt_softplus = rest
            if cu_seqlens is not None:
                bounds("selective_scan", cu_seqlens, dy.shape[1])
            return of.backward(
                dy, dlast, *given, kept, dt_softplus, cu_seqlens=cu_seqlens, **room
            )

        def run_backward(dy: Tensor, dlast: Tensor | None, *rest: Any) -> list[Tensor]:
            return as_promised(dy, rest[:_COUNT], gradients_of(dy, dlast, *rest))

        def run_backward_into(
            dy: Tensor, dlast: Tensor | None, *rest: Any, dgate: Tensor
        ) -> list[Tensor]:
            inputs = list(rest[:_COUNT])
            room = {"dgate": dgate} if of.takes_dgate else {}
            gradients = list(gradients_of(dy, dlast, *rest, **room))
            del inputs[_GATE]
            found = gradients.pop(_GATE)
            if found is not dgate and found is not None:
                dgate.copy_(found)
            return as_promised(dy, inputs, gradients)

        torch.library.impl(forward_name, key, run)
        torch.library.impl(backward_name, key, run_backward)
        torch.library.impl(f"{backward_name}.into", key, run_backward_into)

    for key, of in kernels.items():
        implement(key, of)

    class Gradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
            *inputs, dt_softplus, _, _ = arguments
            # not those of the call, which an older release may have exported
            x, A, packed = inputs[0], inputs[2], inputs[-1] is not None
            steps = steps_to_save(kernels, x, (*x.shape, A.shape[1]), packed)
            inputs[-1] = kept_for_backward(inputs[-1])
            with torch._C._AutoDispatchBelowAutograd():
                y, last, kept = forward_op(*inputs, dt_softplus, steps, True)
            ctx.save_for_backward(*inputs, kept)
            ctx.dt_softplus = dt_softplus
            ctx.mark_non_differentiable(kept)
            ctx.set_materialize_grads(False)
            return y, last, kept

        @staticmethod
        def backward(
            ctx: Any, dy: Tensor | None, dlast: Tensor | None, _: None
        ) -> tuple[Tensor | None, ...]:
            *inputs, kept = ctx.saved_tensors
            if dy is None:
                dy = torch.zeros_like(inputs[0])
            gradients = backward_op(dy, dlast, *inputs, kept, ctx.dt_softplus)
            *differentiable, _ = inputs
            present = (
                None if t is None else g for t, g in zip(differentiable, gradients, strict=True)
            )
            return *present, None, None, None, None

    @torch.library.impl(forward_name, "Autograd")
    def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        refuse_tangents("selective_scan", arguments)
        if torch.is_grad_enabled() and any_requires_grad(arguments):
            refuse_transforms("selective_scan")
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

    def scan(x: Tensor, *rest: Any, cu_seqlens: Tensor | None = None) -> tuple[Tensor, Tensor]:
        *given, dt_softplus = rest
        steps = checkpoint_steps(kernels, x.device)
        y, last, _ = forward_op(x, *given, cu_seqlens, dt_softplus, steps, False)
        return y, last

    return scan
