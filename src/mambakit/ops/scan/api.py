"""What ``selective_scan`` and ``selective_step`` mean, what they accept, and what runs them."""

from typing import NamedTuple

from jaxtyping import Bool, Float, Int, Integer
from torch import Tensor

from .._backends import Backend, resolve
from .._packing import arrange
from .._shapes import check_axes, check_floats
from . import fused, parallel, reference

MAX_STATES = 256

_RUN = {"reference": reference.scan, "parallel": parallel.scan, "fused": fused.scan}
_FORMS = {2: "d n", 3: "b l n", 4: "b l g n"}


class ScanOutput(NamedTuple):
    """What a scan gives back: the output, and the state to continue from.

    ``y`` is (b, l, d) from ``selective_scan`` and (b, d) from ``selective_step``, in the dtype
    of ``x``. ``state`` is (s, d, n) in float32, or float64 if ``x`` is: one for each sequence,
    which are the ``b`` rows of the batch where they are not those of a pack.
    """

    y: Float[Tensor, "b *l d"]
    state: Float[Tensor, "s d n"]


def selective_scan(
    x: Float[Tensor, "b l d"],
    dt: Float[Tensor, "b l d"],
    A: Float[Tensor, "d n"],
    B: Float[Tensor, "d n"] | Float[Tensor, "b l n"] | Float[Tensor, "b l g n"],
    C: Float[Tensor, "d n"] | Float[Tensor, "b l n"] | Float[Tensor, "b l g n"],
    D: Float[Tensor, " d"] | None = None,
    *,
    gate: Float[Tensor, "b l d"] | None = None,
    dt_bias: Float[Tensor, " d"] | None = None,
    dt_softplus: bool = False,
    state: Float[Tensor, "b d n"] | Float[Tensor, "s d n"] | None = None,
    cu_seqlens: Int[Tensor, " bounds"] | None = None,
    lengths: Int[Tensor, " b"] | None = None,
    attention_mask: Bool[Tensor, "b l"] | Integer[Tensor, "b l"] | None = None,
    backend: Backend = "auto",
) -> ScanOutput:
    """Run a diagonal linear recurrence whose coefficients change at every time step.

    Each of the ``d`` channels carries ``n`` numbers of state ``h``:

        h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t
        y_t = (C_t . h_t + D x_t) silu(gate_t)

    The layout is channels-last. Any strides are accepted. Where the last axis has stride 1
    nothing is copied for them, so slices of a wider tensor are as good as a tensor of their
    own; a tensor whose last axis is not dense is copied once. Gradients flow to every tensor,
    from ``y`` and from the state, and the backward pass is deterministic. It keeps the inputs
    and a few states, never a tensor of (b, l, d, n). Forward-mode and second derivatives, and
    those by ``torch.func``, are the reference's alone. Values are not inspected: a NaN reaches
    the steps after it in its own sequence and nothing else.

    Sequences of several lengths share a call in either of two ways. Laid end to end in a batch
    of 1, with ``cu_seqlens``, they cost what one sequence of their total length costs. Padded
    to a common length, with ``lengths`` or ``attention_mask``, they are copied into a pack and
    back. Each of them is what it would be alone. At most one of the three may be given.

    Args:
        x: Input signal, float32, bfloat16, float16 or float64. Any length, also 0.
        dt: Step sizes, positive: in the same unit of time as 1 / ``A``. A small step lets
            the state persist, a large one overwrites it with the current input. With
            ``dt_softplus`` it may have any sign.
        A: Decay rates, negative, so that ``exp(dt A)`` lies in (0, 1). At most 256 states.
        B: How strongly the input writes to each state: (d, n) the same at every step,
            (b, l, n) per step and shared by all channels, or (b, l, g, n) per step and
            group: channel ``c`` belongs to group ``c // (d / g)``.
        C: How strongly each state is read, in any of the three forms of ``B``.
        D: Gain of the direct path from input to output. ``None`` means no such path.
        gate: The output is multiplied by silu(gate). ``None`` means no gate.
        dt_bias: Added to ``dt``, before softplus. ``None`` means nothing is added.
        dt_softplus: Use log(1 + exp(dt + dt_bias)) as the step size.
        state: State before the first step of each sequence. ``None`` means zeros.
        cu_seqlens: Where each of the ``s`` sequences of a pack begins, and ``l``: s + 1 numbers
            that rise from 0, int32 or int64. ``b`` is then 1, and ``state`` is (s, d, n). Best
            on the CPU, where it is also no obstacle to a compiler: from another device it is
            fetched, for which the processor waits. ``None`` means that each row of the batch
            is one sequence.
        lengths: How many steps at the beginning of each row are its sequence, from 1 to ``l``;
            what follows is padding. It is read by the processor, as ``cu_seqlens`` is.
        attention_mask: 1 or ``True`` where a token is and 0 at the padding, which may lie on
            the left, on the right or on both sides: the ones of a row are one run. Read by the
            processor too. Whatever lies at padding reaches nothing: there ``y`` is 0, and so is
            the gradient of every input.
        backend: ``"reference"`` is one step at a time in eager PyTorch, the definition.
            ``"parallel"`` is PyTorch alone, chunked, on any device. ``"fused"`` is the
            kernel for the device of ``x``, and raises if there is none. ``"auto"`` is
            ``"fused"`` where the device has it, else ``"parallel"``.

    Returns:
        ``y`` in the dtype of ``x``, and the ``state`` after the last step of each sequence,
        always in float32, or float64 if ``x`` is float64. Feed it to the next call to continue
        the sequence: the cut may fall anywhere and does not change the result. All arithmetic
        is in the dtype of the state, whatever the inputs have, and under ``torch.autocast``
        too.

    Raises:
        ValueError: A shape, dtype, device or layout is wrong, or the backend's name, or the
            values of ``cu_seqlens``, ``lengths`` or ``attention_mask`` are.
        RuntimeError: ``backend="fused"`` cannot run on this device or in this installation,
            or a second or forward-mode derivative, or one by ``torch.func``, is asked of a
            backend other than ``"reference"``.

    Source:
        Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces",
        section 3.2, algorithm 2; ``A`` discretised by zero-order hold, ``B`` by Euler.

    Example:
        A sequence may be cut anywhere and continued from the state:

        >>> import torch
        >>> from mambakit.ops import selective_scan
        >>> b, l, d, n = 2, 64, 8, 16
        >>> x, dt = torch.randn(b, l, d), torch.rand(b, l, d)
        >>> A = -torch.rand(d, n)
        >>> B, C = torch.randn(b, l, n), torch.randn(b, l, n)
        >>> whole = selective_scan(x, dt, A, B, C)
        >>> left = selective_scan(x[:, :40], dt[:, :40], A, B[:, :40], C[:, :40])
        >>> right = selective_scan(
        ...     x[:, 40:], dt[:, 40:], A, B[:, 40:], C[:, 40:], state=left.state
        ... )
        >>> torch.testing.assert_close(right.state, whole.state)
        >>> torch.testing.assert_close(torch.cat([left.y, right.y], dim=1), whole.y)

        Sequences laid end to end stay apart, each as if it were alone:

        >>> x, dt, B, C = x[:1], dt[:1], B[:1], C[:1]
        >>> packed = selective_scan(x, dt, A, B, C, cu_seqlens=torch.tensor([0, 40, 64]))
        >>> alone = selective_scan(x[:, 40:], dt[:, 40:], A, B[:, 40:], C[:, 40:])
        >>> torch.testing.assert_close(packed.y[:, 40:], alone.y)
        >>> torch.testing.assert_close(packed.state[1:], alone.state)
    """
    check_floats(
        "selective_scan", "x", "dt", "A", "B", "C",
        x=x, dt=dt, A=A, B=B, C=C, D=D, gate=gate, dt_bias=dt_bias, state=state,
    )  # fmt: skip
    sizes = check_axes(
        "selective_scan",
        x=(x, "b l d"), dt=(dt, "b l d"), A=(A, "d n"),
        B=(B, _form("selective_scan", "B", B)), C=(C, _form("selective_scan", "C", C)),
        D=(D, "d"), gate=(gate, "b l d"), dt_bias=(dt_bias, "d"),
        state=(state if cu_seqlens is None else None, "b d n"),
    )  # fmt: skip
    _check_rest("selective_scan", sizes, dt_softplus)
    cu_seqlens, packing = arrange(
        "selective_scan", sizes["b"], sizes["l"], x.device, cu_seqlens, lengths, attention_mask
    )
    if cu_seqlens is not None and packing is None:
        _check_states(state, cu_seqlens.shape[0] - 1, sizes)
    run = _RUN[resolve("selective_scan", backend, x.device)]
    if packing is not None:
        x, dt = packing.pack(x), packing.pack(dt)
        B, C = (M if M.ndim == 2 else packing.pack(M) for M in (B, C))
        gate = None if gate is None else packing.pack(gate)
    y, last = run(x, dt, A, B, C, D, gate, dt_bias, state, dt_softplus, cu_seqlens=cu_seqlens)
    return ScanOutput(y if packing is None else packing.unpack(y), last)


def selective_step(
    x: Float[Tensor, "b d"],
    dt: Float[Tensor, "b d"],
    A: Float[Tensor, "d n"],
    B: Float[Tensor, "b n"] | Float[Tensor, "b g n"],
    C: Float[Tensor, "b n"] | Float[Tensor, "b g n"],
    D: Float[Tensor, " d"] | None = None,
    *,
    gate: Float[Tensor, "b d"] | None = None,
    dt_bias: Float[Tensor, " d"] | None = None,
    dt_softplus: bool = False,
    state: Float[Tensor, "b d n"] | None = None,
    backend: Backend = "auto",
) -> ScanOutput:
    """Advance the recurrence of ``selective_scan`` by one step: its law at l = 1.

        h' = exp(dt A) h + dt B x
        y  = (C . h' + D x) silu(gate)

    Args:
        x: Input at this step, one vector for each sequence.
        dt: Step sizes, as in ``selective_scan``; so are all arguments that follow.
        A: Decay rates, negative.
        B: (b, n) shared by all channels, or (b, g, n) by groups of channels. Coefficients
            that are constant, (d, n), are ``B.expand(b, d, n)``: a group for each channel and
            no copy. (As a matrix they could not be told from (b, n) where b = d.)
        C: How strongly each state is read, in either form of ``B``.
        D: Gain of the direct path. ``None`` means no such path.
        gate: The output is multiplied by silu(gate). ``None`` means no gate.
        dt_bias: Added to ``dt``, before softplus. ``None`` means nothing is added.
        dt_softplus: Use log(1 + exp(dt + dt_bias)) as the step size.
        state: State before this step. ``None`` means zeros. It is not changed.
        backend: As in ``selective_scan``.

    Returns:
        ``y`` (b, d) in the dtype of ``x``, and the new ``state`` in float32, or float64 if
        ``x`` is float64.

    Raises:
        ValueError: A shape, dtype, device or layout is wrong, or the backend's name.
        RuntimeError: ``backend="fused"`` cannot run on this device or in this installation,
            or a second or forward-mode derivative, or one by ``torch.func``, is asked of a
            backend other than ``"reference"``.

    Source:
        As ``selective_scan``.

    Example:
        Stepping through a sequence is the scan:

        >>> import torch
        >>> from mambakit.ops import selective_scan, selective_step
        >>> x, dt, A = torch.randn(2, 5, 3), torch.rand(2, 5, 3), -torch.rand(3, 4)
        >>> B, C = torch.randn(2, 5, 4), torch.randn(2, 5, 4)
        >>> state = None
        >>> for t in range(5):
        ...     y, state = selective_step(x[:, t], dt[:, t], A, B[:, t], C[:, t], state=state)
        >>> whole = selective_scan(x, dt, A, B, C)
        >>> torch.testing.assert_close(y, whole.y[:, -1])
        >>> torch.testing.assert_close(state, whole.state)
    """
    check_floats(
        "selective_step", "x", "dt", "A", "B", "C",
        x=x, dt=dt, A=A, B=B, C=C, D=D, gate=gate, dt_bias=dt_bias, state=state,
    )  # fmt: skip
    sizes = check_axes(
        "selective_step",
        x=(x, "b d"), dt=(dt, "b d"), A=(A, "d n"),
        B=(B, _form_of_step("B", B)), C=(C, _form_of_step("C", C)),
        D=(D, "d"), gate=(gate, "b d"), dt_bias=(dt_bias, "d"), state=(state, "b d n"),
    )  # fmt: skip
    _check_rest("selective_step", sizes, dt_softplus)
    run = _RUN[resolve("selective_step", backend, x.device)]
    y, last = run(
        x.unsqueeze(1), dt.unsqueeze(1), A, B.unsqueeze(1), C.unsqueeze(1), D,
        None if gate is None else gate.unsqueeze(1), dt_bias, state, dt_softplus,
    )  # fmt: skip
    return ScanOutput(y.squeeze(1), last)


def _form(operation: str, name: str, M: Tensor) -> str:
    axes = _FORMS.get(M.ndim)
    if axes is None:
        raise ValueError(
            f"{operation}: {name} must have shape (d, n), (b, l, n) or (b, l, g, n), "
            f"got {tuple(M.shape)}"
        )
    return axes


def _form_of_step(name: str, M: Tensor) -> str:
    axes = {2: "b n", 3: "b g n"}.get(M.ndim)
    if axes is None:
        raise ValueError(
            f"selective_step: {name} must have shape (b, n) or (b, g, n), got {tuple(M.shape)}"
        )
    return axes


def _check_states(state: Tensor | None, s: int, sizes: dict[str, int]) -> None:
    """Check that the state of a pack is one for each of its ``s`` sequences."""
    if state is not None and state.shape != (s, sizes["d"], sizes["n"]):
        raise ValueError(
            f"selective_scan: state must have shape (s={s}, d={sizes['d']}, n={sizes['n']}), "
            f"got {tuple(state.shape)}"
        )


def _check_rest(operation: str, sizes: dict[str, int], dt_softplus: bool) -> None:
    if not 1 <= sizes["n"] <= MAX_STATES:
        raise ValueError(
            f"{operation}: A must have between 1 and {MAX_STATES} states (its last axis), "
            f"got {sizes['n']}"
        )
    if sizes["d"] < 1:
        raise ValueError(f"{operation}: x must have at least one channel, got 0")
    groups = sizes.get("g", 1)
    if groups < 1 or sizes["d"] % groups != 0:
        raise ValueError(
            f"{operation}: B and C must have a number of groups that divides d={sizes['d']}, "
            f"got {groups}"
        )
    if not isinstance(dt_softplus, bool):
        raise ValueError(
            f"{operation}: dt_softplus must be True or False, "
            f"got a {type(dt_softplus).__name__}"
        )
