"""The scan in Triton, for GPUs that the CUDA kernels do not serve: right, and not tuned.

A program owns one row of the batch and a block of channels of one group, with all their states:
a tile (channels, states) that walks along time. Loads of a few steps are issued together,
before the arithmetic of the first of them, so that their latencies overlap.

Forward saves the states that the CUDA kernels save, in the same layout, so that a compiler need
not know which of them will run. Backward takes these tiles of time last to first. It walks a
tile forward, keeping the state before each group of a few steps in a scratch of its own, then
walks the groups back: once more forward with the states in registers, and back over them with
the adjoint.

Sums over channels (dB, dC) are left as one partial sum for each block of channels and added by
PyTorch; sums over time stay in the program, sums over the batch are PyTorch's as well. Nothing
is added atomically, so two runs give the same bits. Where the partial sums of many states would
outgrow the inputs, blocks of channels take turns to add to the same ones.

A sequence of a pack is a row of its own, which begins and ends where a copy of ``cu_seqlens``
on the GPU says. That copy is made from pinned memory, so nothing waits for it.
"""

import itertools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .cuda.operands import CHECKPOINT_STEPS, checkpoint_shape

__all__ = ["backward", "checkpoint_shape", "forward"]

# Steps whose operands are loaded together; they divide CHECKPOINT_STEPS. More of them spill.
_FORWARD_GROUP, _BACKWARD_GROUP = 8, 2
# A program's channels, and the elements of its tile for which a warp is taken.
_FEWEST_CHANNELS, _MOST_CHANNELS, _WARP_ELEMENTS = 16, 64, 256
# Programs of the backward pass over a pack that run together: each has a scratch of its own.
_MOST_PROGRAMS = 4096

_LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
_LOG_2: tl.constexpr = tl.constexpr(0.6931471805599453)


def forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    gate: Tensor | None,
    dt_bias: Tensor | None,
    state: Tensor | None,
    dt_softplus: bool,
    save: bool,
    *,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the scan; return ``y``, the last state and, if ``save``, the checkpoints.

    ``cu_seqlens`` (s+1), int64 on the CPU, says where the sequences of a pack begin and where
    the last one ends; ``state`` and the last state are then (s, d, n).

    Raises:
        RuntimeError: A CUDA graph is being captured, and this is a pack.
    """
    call = _Call(x, dt, A, B, C, D, gate, dt_bias, state, dt_softplus, cu_seqlens)
    b, l, d, n = call.sizes
    y = x.new_empty(b, l, d)
    last = x.new_empty(call.rows, d, n, dtype=call.wide)
    saved = checkpoint_shape(b, l, d, n, None if cu_seqlens is None else call.rows)
    checkpoints = x.new_empty(saved if save else 0, dtype=call.wide)
    with torch.accelerator.device_index(x.device.index):
        _forward[(call.rows * call.groups * call.blocks,)](
            **call.operands,
            y=y,
            last=last,
            checkpoints=checkpoints if save else None,
            **call.constants,
            GROUP=_FORWARD_GROUP,
        )
    return y, last, checkpoints


def backward(
    dy: Tensor,
    dlast_state: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    gate: Tensor | None,
    dt_bias: Tensor | None,
    state: Tensor | None,
    checkpoints: Tensor,
    dt_softplus: bool,
    *,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """Return the gradient of each operand, in its own dtype, from what ``forward`` saved.

    Raises:
        RuntimeError: As ``forward``.
    """
    call = _Call(x, dt, A, B, C, D, gate, dt_bias, state, dt_softplus, cu_seqlens)
    b, l, d, n = call.sizes
    rows = call.rows
    groups, blocks = call.groups, call.blocks

    def room(*shape: int) -> Tensor:
        return x.new_empty(shape, dtype=call.wide)

    # As many partial sums as x has elements at most; the blocks beyond them wait for a turn.
    slots = min(blocks, max(1, d // (groups * n)))

    def sums(like: Tensor) -> Tensor:
        return room(rows, d, n) if like.ndim == 2 else room(slots, b, l, groups, n)

    dx, ddt, dgate = _like(x), _like(dt), _like(gate)
    dA, dB, dC = room(rows, d, n), sums(B), sums(C)
    dD = None if D is None else room(rows, d)
    ddt_bias = None if dt_bias is None else room(rows, d)
    dstate = None if state is None else room(rows, d, n)
    dy = _dense(dy)
    dlast = None if dlast_state is None else dlast_state.to(call.wide).contiguous()
    together = rows
    if cu_seqlens is not None:
        together = min(rows, max(1, _MOST_PROGRAMS // (groups * slots)))
    parts = CHECKPOINT_STEPS // _BACKWARD_GROUP
    scratch = room(together * groups * slots, parts, call.channels, call.states)
    turns = itertools.product(range(0, blocks, slots), range(0, rows, together))
    with torch.accelerator.device_index(x.device.index):
        for first, first_row in turns:
            count = min(slots, blocks - first)
            _backward[(min(together, rows - first_row) * groups * count,)](
                **call.operands,
                checkpoints=checkpoints,
                scratch=scratch,
                dy=dy,
                dy_row=0 if cu_seqlens is not None else dy.stride(0),
                dy_time=dy.stride(1),
                dlast=dlast,
                dx=dx,
                ddt=ddt,
                dgate=dgate,
                dA=dA,
                dB=dB,
                dC=dC,
                dD=dD,
                ddt_bias=ddt_bias,
                dstate=dstate,
                slot_size=b * l * groups * n,
                first=first,
                first_row=first_row,
                count=count,
                **call.constants,
                GROUP=_BACKWARD_GROUP,
            )
    return (
        dx,
        ddt,
        _gathered(dA, A),
        _gathered(dB, B),
        _gathered(dC, C),
        _gathered(dD, D),
        dgate,
        _gathered(ddt_bias, dt_bias),
        None if dstate is None or state is None else dstate.to(state.dtype),
    )


class _Call:
    """The operands of one call as the kernels see them, and how the work is cut."""

    def __init__(
        self,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        gate: Tensor | None,
        dt_bias: Tensor | None,
        state: Tensor | None,
        dt_softplus: bool,
        cu_seqlens: Tensor | None,
    ) -> None:
        b, l, d = x.shape
        n = A.shape[1]
        self.sizes = (b, l, d, n)
        packed = cu_seqlens is not None
        self.rows = b if cu_seqlens is None else len(cu_seqlens) - 1
        self.wide = torch.promote_types(x.dtype, torch.float32)
        self.groups = next((M.shape[2] for M in (B, C) if M.ndim == 4), 1)
        members = d // self.groups
        self.states = triton.next_power_of_2(n)
        self.channels = min(
            triton.next_power_of_2(members),
            max(_FEWEST_CHANNELS, min(_MOST_CHANNELS, _WARP_ELEMENTS // self.states)),
        )
        self.blocks = triton.cdiv(members, self.channels)
        x, dt = _dense(x), _dense(dt)
        gate = None if gate is None else _dense(gate)
        B, C = _dense(B), _dense(C)
        self.operands: dict[str, Any] = {
            "x": x,
            "dt": dt,
            "A": A.contiguous(),
            "B": B,
            "C": C,
            "D": None if D is None else D.contiguous(),
            "gate": gate,
            "dt_bias": None if dt_bias is None else dt_bias.contiguous(),
            "state": None if state is None else state.contiguous(),
            **_strides("x", x, packed),
            **_strides("dt", dt, packed),
            **_strides("gate", gate, packed),
            **_coefficient_strides("B", B, packed),
            **_coefficient_strides("C", C, packed),
            "cu": None if cu_seqlens is None else _sent(cu_seqlens, x.device),
            "l": l,
            "d": d,
            "n": n,
            "members": members,
            "blocks": self.blocks,
        }
        self.constants = {
            "B_CONSTANT": B.ndim == 2,
            "C_CONSTANT": C.ndim == 2,
            "SOFTPLUS": dt_softplus,
            "WIDE": tl.float64 if self.wide == torch.float64 else tl.float32,
            "CHANNELS": self.channels,
            "STATES": self.states,
            "STEPS": CHECKPOINT_STEPS,
            "num_warps": max(1, self.channels * self.states // _WARP_ELEMENTS),
        }


def _dense(tensor: Tensor) -> Tensor:
    """Return the tensor with its last axis dense: itself, or a copy. A matrix is all dense."""
    if tensor.ndim == 2 or tensor.stride(-1) != 1:
        return tensor.contiguous()
    return tensor


def _sent(cu_seqlens: Tensor, device: torch.device) -> Tensor:
    """Return a copy on the device, without waiting for what the device does."""
    if device.type == "cpu":  # Triton's interpreter
        return cu_seqlens
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "selective_scan: the Triton kernels cannot run a pack in a CUDA graph, which would "
            "copy cu_seqlens again from memory that has gone"
        )
    return cu_seqlens.pin_memory().to(device, non_blocking=True)


def _strides(name: str, rows: Tensor | None, packed: bool) -> dict[str, int]:
    batch, time = (0, 0) if rows is None else rows.stride()[:2]
    # the sequences of a pack lie at their steps
    return {f"{name}_row": 0 if packed else batch, f"{name}_time": time}


def _coefficient_strides(name: str, M: Tensor, packed: bool) -> dict[str, int]:
    # a coefficient that all groups share stays where it is from group to group
    group = M.stride(2) if M.ndim == 4 else 0
    rows = None if M.ndim == 2 else M
    return {**_strides(name, rows, packed), f"{name}_group": group}


def _like(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.new_empty(tensor.shape)


def _gathered(partial: Tensor | None, like: Tensor | None) -> Tensor | None:
    """Sum over the rows of the batch, or over blocks of channels and the groups that share."""
    if partial is None or like is None:
        return None
    over = (0, 3) if partial.ndim == like.ndim + 2 else 0
    return partial.sum(over).to(like.dtype)


@triton.jit
def _sigmoid(v: tl.tensor) -> tl.tensor:
    return 1.0 / (1.0 + tl.exp2(v * -_LOG2_E))


@triton.jit
def _softplus(v: tl.tensor, WIDE: tl.constexpr) -> tl.tensor:
    """max(v, 0) + log1p(e^-|v|), written out: Triton has no log1p for every device."""
    e = tl.exp2(tl.abs(v) * -_LOG2_E)
    if WIDE == tl.float64:  # noqa: SIM300 - not a constant but a parameter
        # the logarithm of the rounded sum, and the first order of what the rounding lost
        one_more = 1.0 + e
        tail = tl.log(one_more) + (e - (one_more - 1.0)) / one_more
    else:
        # 2 artanh(s), a series in s <= 1/3: the fast logarithm loses the digits of a small e
        s = e / (2.0 + e)
        q = s * s
        p = 1 / 5 + q * (1 / 7 + q * (1 / 9 + q * (1 / 11 + q * (1 / 13))))
        tail = 2.0 * s * (1.0 + q * (1 / 3 + q * p))
    return tl.maximum(v, 0.0) + tail


@triton.jit
def _step(
    raw: tl.tensor, valid: tl.tensor, SOFTPLUS: tl.constexpr, WIDE: tl.constexpr
) -> tl.tensor:
    """The step size; behind the end zero, so that the state stays as it is."""
    step = _softplus(raw, WIDE) if SOFTPLUS else raw
    return tl.where(valid, step, 0.0)


@triton.jit
def _place(
    count: tl.tensor, first: tl.tensor, d: tl.tensor, members: tl.tensor,
    CHANNELS: tl.constexpr,
) -> tuple:  # fmt: skip
    """This program's row of the batch, group, slot, first channel, and which of them exist."""
    place = tl.program_id(0).to(tl.int64)
    slot = place % count
    groups = d // members
    group = (place // count) % groups
    row = place // count // groups
    member = (first + slot) * CHANNELS
    return row, group, slot, group * members + member, tl.arange(0, CHANNELS) < members - member


@triton.jit
def _sequence(row: tl.tensor, cu: tl.tensor, l: tl.tensor, STEPS: tl.constexpr) -> tuple:
    """Where a row's sequence begins in inputs, outputs and checkpoints, and its steps."""
    if cu is None:
        return 0, row * l, row * tl.cdiv(l, STEPS), l
    else:  # noqa: RET505 - as below
        origin = tl.load(cu + row)
        steps = (tl.load(cu + row + 1) - origin).to(tl.int32)
        return origin, origin, origin // STEPS + row, steps


@triton.jit
def _coefficient(
    M: tl.tensor, row: tl.tensor, origin: tl.tensor, group: tl.tensor,
    M_row: tl.tensor, M_time: tl.tensor, M_group: tl.tensor,
    channel: tl.tensor, exists: tl.tensor, cell: tl.tensor, l: tl.tensor, n: tl.tensor,
    STATES: tl.constexpr, CONSTANT: tl.constexpr,
) -> tuple:  # fmt: skip
    """Where a coefficient is at the first step, (1 or channels, states), and its end."""
    if CONSTANT:
        return M + channel * n, cell, tl.where(exists, l, 0)
    else:  # noqa: RET505 - the compiler reads a choice between two types only from both branches
        index = tl.arange(0, STATES)[None, :]
        M += row * M_row + origin * M_time + group * M_group
        return M, index, tl.where(index < n, l, 0)


@triton.jit
def _vector(
    at: tl.tensor, inside: tl.tensor, WIDE: tl.constexpr, CHANNELS: tl.constexpr
) -> tl.tensor:
    """A number for each channel; zeros if there is none."""
    if at is None:
        return tl.zeros([CHANNELS], WIDE)
    else:  # noqa: RET505 - as above
        return tl.load(at + tl.arange(0, CHANNELS), mask=inside, other=0.0).to(WIDE)


@triton.jit
def _load(
    at: tl.tensor, time: tl.tensor, offset: tl.tensor, start: tl.tensor, end: tl.tensor,
    GROUP: tl.constexpr,
) -> tuple:  # fmt: skip
    """A group of steps, with zeros from the end on."""
    values = ()  # grows by sums, for Triton knows no unpacking
    for u in tl.static_range(GROUP):
        t = start + u
        value = tl.load(at + t * time + offset, mask=t < end, other=0.0)
        values = values + (value,)  # type: ignore[assignment]  # noqa: RUF005
    return values


@triton.jit
def _forward(
    x: tl.tensor, dt: tl.tensor, A: tl.tensor, B: tl.tensor, C: tl.tensor, D: tl.tensor,
    gate: tl.tensor, dt_bias: tl.tensor, state: tl.tensor,
    x_row: tl.int64, x_time: tl.int64, dt_row: tl.int64, dt_time: tl.int64,
    gate_row: tl.int64, gate_time: tl.int64,
    B_row: tl.int64, B_time: tl.int64, B_group: tl.int64,
    C_row: tl.int64, C_time: tl.int64, C_group: tl.int64,
    cu: tl.tensor,
    l: tl.int32, d: tl.int64, n: tl.int32, members: tl.int64, blocks: tl.int64,
    y: tl.tensor, last: tl.tensor, checkpoints: tl.tensor,
    B_CONSTANT: tl.constexpr, C_CONSTANT: tl.constexpr, SOFTPLUS: tl.constexpr,
    WIDE: tl.constexpr, CHANNELS: tl.constexpr, STATES: tl.constexpr,
    STEPS: tl.constexpr, GROUP: tl.constexpr,
) -> None:  # fmt: skip
    row, group, _, channel, inside = _place(blocks, 0, d, members, CHANNELS)
    origin, out_row, first_saved, l = _sequence(row, cu, l, STEPS)
    # Addresses are a scalar of 64 bits, which moves, and small offsets, which stay.
    lane = tl.arange(0, CHANNELS)
    index = tl.arange(0, STATES)
    cell = lane[:, None] * n + index[None, :]
    exists = inside[:, None] & (index < n)[None, :]
    # the first step that a channel or a state does not have: none at all if it is padding
    end = tl.where(inside, l, 0)
    B, B_cell, B_end = _coefficient(
        B, row, origin, group, B_row, B_time, B_group, channel, exists, cell, l, n,
        STATES, B_CONSTANT,
    )  # fmt: skip
    C, C_cell, C_end = _coefficient(
        C, row, origin, group, C_row, C_time, C_group, channel, exists, cell, l, n,
        STATES, C_CONSTANT,
    )  # fmt: skip
    x += row * x_row + origin * x_time + channel
    dt += row * dt_row + origin * dt_time + channel
    y += out_row * d + channel
    if gate is not None:
        gate += row * gate_row + origin * gate_time + channel
    if D is not None:
        D += channel
    if dt_bias is not None:
        dt_bias += channel

    a = tl.load(A + channel * n + cell, mask=exists, other=0.0).to(WIDE) * _LOG2_E
    bias = _vector(dt_bias, inside, WIDE, CHANNELS)
    skip = _vector(D, inside, WIDE, CHANNELS)
    states_of_row = (row * d + channel) * n
    h = tl.zeros([CHANNELS, STATES], WIDE)
    if state is not None:
        h += tl.load(state + states_of_row + cell, mask=exists, other=0.0).to(WIDE)

    for start in range(0, l, GROUP):
        if checkpoints is not None:  # noqa: SIM102 - this is asked while compiling
            if start % STEPS == 0:
                tile = first_saved + start // STEPS
                tl.store(checkpoints + (tile * d + channel) * n + cell, h, mask=exists)
        dts = _load(dt, dt_time, lane, start, end, GROUP)
        xs = _load(x, x_time, lane, start, end, GROUP)
        Bs = _load(B, B_time, B_cell, start, B_end, GROUP)
        Cs = _load(C, C_time, C_cell, start, C_end, GROUP)
        if gate is not None:
            gates = _load(gate, gate_time, lane, start, end, GROUP)
        for u in tl.static_range(GROUP):
            t = start + u
            signal = xs[u].to(WIDE)
            step = _step(dts[u].to(WIDE) + bias, t < end, SOFTPLUS, WIDE)
            drive = (step * signal)[:, None] * Bs[u].to(WIDE)
            h = tl.exp2(step[:, None] * a) * h + drive
            out = tl.sum(h * Cs[u].to(WIDE), 1) + skip * signal
            if gate is not None:
                z = gates[u].to(WIDE)
                out = out * (z * _sigmoid(z))
            tl.store(y + t * d + lane, out, mask=t < end)
    tl.store(last + states_of_row + cell, h, mask=exists)


@triton.jit
def _backward(
    x: tl.tensor, dt: tl.tensor, A: tl.tensor, B: tl.tensor, C: tl.tensor, D: tl.tensor,
    gate: tl.tensor, dt_bias: tl.tensor, state: tl.tensor,
    x_row: tl.int64, x_time: tl.int64, dt_row: tl.int64, dt_time: tl.int64,
    gate_row: tl.int64, gate_time: tl.int64,
    B_row: tl.int64, B_time: tl.int64, B_group: tl.int64,
    C_row: tl.int64, C_time: tl.int64, C_group: tl.int64,
    cu: tl.tensor,
    l: tl.int32, d: tl.int64, n: tl.int32, members: tl.int64, blocks: tl.int64,
    checkpoints: tl.tensor, scratch: tl.tensor,
    dy: tl.tensor, dy_row: tl.int64, dy_time: tl.int64, dlast: tl.tensor,
    dx: tl.tensor, ddt: tl.tensor, dgate: tl.tensor,
    dA: tl.tensor, dB: tl.tensor, dC: tl.tensor, dD: tl.tensor, ddt_bias: tl.tensor,
    dstate: tl.tensor,
    slot_size: tl.int64, first: tl.int64, count: tl.int64, first_row: tl.int64,
    B_CONSTANT: tl.constexpr, C_CONSTANT: tl.constexpr, SOFTPLUS: tl.constexpr,
    WIDE: tl.constexpr, CHANNELS: tl.constexpr, STATES: tl.constexpr,
    STEPS: tl.constexpr, GROUP: tl.constexpr,
) -> None:  # fmt: skip
    row, group, slot, channel, inside = _place(count, first, d, members, CHANNELS)
    row += first_row
    origin, out_row, first_saved, l = _sequence(row, cu, l, STEPS)
    lane = tl.arange(0, CHANNELS)
    index = tl.arange(0, STATES)
    cell = lane[:, None] * n + index[None, :]
    exists = inside[:, None] & (index < n)[None, :]
    end = tl.where(inside, l, 0)
    B, B_cell, B_end = _coefficient(
        B, row, origin, group, B_row, B_time, B_group, channel, exists, cell, l, n,
        STATES, B_CONSTANT,
    )  # fmt: skip
    C, C_cell, C_end = _coefficient(
        C, row, origin, group, C_row, C_time, C_group, channel, exists, cell, l, n,
        STATES, C_CONSTANT,
    )  # fmt: skip
    x += row * x_row + origin * x_time + channel
    dt += row * dt_row + origin * dt_time + channel
    dy += row * dy_row + origin * dy_time + channel
    dx += out_row * d + channel
    ddt += out_row * d + channel
    if gate is not None:
        gate += row * gate_row + origin * gate_time + channel
        dgate += out_row * d + channel
    if D is not None:
        D += channel
    if dt_bias is not None:
        dt_bias += channel
    states_of_row = (row * d + channel) * n
    sums_time = (d // members) * n
    sums = slot * slot_size + out_row * sums_time + group * n
    sums_end = tl.where(index < n, l, 0)
    turn_end = tl.where(first > 0, sums_end, 0)
    scratch += tl.program_id(0).to(tl.int64) * (STEPS // GROUP * CHANNELS * STATES)
    kept = lane[:, None] * STATES + index[None, :]

    a = tl.load(A + channel * n + cell, mask=exists, other=0.0).to(WIDE) * _LOG2_E
    bias = _vector(dt_bias, inside, WIDE, CHANNELS)
    skip = _vector(D, inside, WIDE, CHANNELS)
    # what later steps ask of the state between two steps
    carry = tl.zeros([CHANNELS, STATES], WIDE)
    if dlast is not None:
        carry += tl.load(dlast + states_of_row + cell, mask=exists, other=0.0)
    dA_sum = tl.zeros([CHANNELS, STATES], WIDE)
    if B_CONSTANT:
        dB_sum = tl.zeros([CHANNELS, STATES], WIDE)
    if C_CONSTANT:
        dC_sum = tl.zeros([CHANNELS, STATES], WIDE)
    dD_sum = tl.zeros([CHANNELS], WIDE)
    dD_lost = tl.zeros([CHANNELS], WIDE)
    dbias_sum = tl.zeros([CHANNELS], WIDE)
    dbias_lost = tl.zeros([CHANNELS], WIDE)

    tiles = tl.cdiv(l, STEPS)
    for i in range(tiles):
        tile = tiles - 1 - i
        begin = tile * STEPS
        parts = tl.cdiv(tl.minimum(l - begin, STEPS), GROUP)
        saved = ((first_saved + tile) * d + channel) * n
        h = tl.load(checkpoints + saved + cell, mask=exists, other=0.0)
        tl.store(scratch + kept, h)
        for part in range(1, parts):
            start = begin + (part - 1) * GROUP
            dts = _load(dt, dt_time, lane, start, end, GROUP)
            xs = _load(x, x_time, lane, start, end, GROUP)
            Bs = _load(B, B_time, B_cell, start, B_end, GROUP)
            for u in tl.static_range(GROUP):
                step = _step(dts[u].to(WIDE) + bias, start + u < end, SOFTPLUS, WIDE)
                drive = (step * xs[u].to(WIDE))[:, None] * Bs[u].to(WIDE)
                h = tl.exp2(step[:, None] * a) * h + drive
            tl.store(scratch + part * (CHANNELS * STATES) + kept, h)
        # the states may be loaded by other threads than those that stored them
        tl.debug_barrier()

        for j in range(parts):
            part = parts - 1 - j
            start = begin + part * GROUP
            h = tl.load(scratch + part * (CHANNELS * STATES) + kept)
            dts = _load(dt, dt_time, lane, start, end, GROUP)
            xs = _load(x, x_time, lane, start, end, GROUP)
            dys = _load(dy, dy_time, lane, start, end, GROUP)
            Bs = _load(B, B_time, B_cell, start, B_end, GROUP)
            Cs = _load(C, C_time, C_cell, start, C_end, GROUP)
            if gate is not None:
                gates = _load(gate, gate_time, lane, start, end, GROUP)
            states, decays, steps = (h,), (), ()
            for u in tl.static_range(GROUP):
                step = _step(dts[u].to(WIDE) + bias, start + u < end, SOFTPLUS, WIDE)
                decay = tl.exp2(step[:, None] * a)
                h = decay * h + (step * xs[u].to(WIDE))[:, None] * Bs[u].to(WIDE)
                states = states + (h,)  # type: ignore[assignment]  # noqa: RUF005
                decays = decays + (decay,)  # type: ignore[assignment]  # noqa: RUF005
                steps = steps + (step,)  # type: ignore[assignment]  # noqa: RUF005

            for u in tl.static_range(GROUP - 1, -1, -1):
                t = start + u
                B_t, C_t = Bs[u].to(WIDE), Cs[u].to(WIDE)
                signal, step, dout = xs[u].to(WIDE), steps[u], dys[u].to(WIDE)
                if gate is not None:
                    z = gates[u].to(WIDE)
                    sigma = _sigmoid(z)
                    out = tl.sum(states[u + 1] * C_t, 1) + skip * signal
                    dz = dout * out * (sigma * (1.0 + z * (1.0 - sigma)))
                    tl.store(dgate + t * d + lane, dz, mask=t < end)
                    dout = dout * (z * sigma)

                adjoint = carry + dout[:, None] * C_t
                dB_t = adjoint * (step * signal)[:, None]
                dC_t = states[u + 1] * dout[:, None]
                through_drive = tl.sum(adjoint * B_t, 1)
                carry = adjoint * decays[u]
                exponent = carry * states[u]
                through_decay = tl.sum(exponent * a, 1) * _LOG_2
                draw = through_drive * signal + through_decay
                if SOFTPLUS:
                    draw = draw * _sigmoid(dts[u].to(WIDE) + bias)
                dsignal = through_drive * step + skip * dout
                tl.store(dx + t * d + lane, dsignal, mask=t < end)
                tl.store(ddt + t * d + lane, draw, mask=t < end)
                dA_sum += exponent * step[:, None]
                if D is not None:
                    dD_sum, dD_lost = _sum(dD_sum, dD_lost, dout * signal)
                if dt_bias is not None:
                    draw = tl.where(t < end, draw, 0.0)
                    dbias_sum, dbias_lost = _sum(dbias_sum, dbias_lost, draw)
                at = sums + t * sums_time
                if B_CONSTANT:
                    dB_sum += dB_t
                else:
                    _add(dB + at + index, tl.sum(dB_t, 0), t, sums_end, turn_end)
                if C_CONSTANT:
                    dC_sum += dC_t
                else:
                    _add(dC + at + index, tl.sum(dC_t, 0), t, sums_end, turn_end)
        # the next tile's states overwrite these
        tl.debug_barrier()

    tl.store(dA + states_of_row + cell, dA_sum, mask=exists)
    if B_CONSTANT:
        tl.store(dB + states_of_row + cell, dB_sum, mask=exists)
    if C_CONSTANT:
        tl.store(dC + states_of_row + cell, dC_sum, mask=exists)
    if D is not None:
        tl.store(dD + row * d + channel + lane, dD_sum, mask=inside)
    if dt_bias is not None:
        tl.store(ddt_bias + row * d + channel + lane, dbias_sum, mask=inside)
    if state is not None:
        tl.store(dstate + states_of_row + cell, carry, mask=exists)


@triton.jit
def _sum(total: tl.tensor, lost: tl.tensor, value: tl.tensor) -> tuple:
    """Kahan's sum: over a long sequence a plain one is worse than PyTorch's, which pairs."""
    value = value - lost
    new = total + value
    return new, (new - total) - value


@triton.jit
def _add(
    at: tl.tensor, values: tl.tensor, t: tl.tensor, end: tl.tensor, turn_end: tl.tensor
) -> None:
    """Store a block's part of a sum over channels, on top of the part of the turn before."""
    before = tl.load(at, mask=t < turn_end, other=0.0)
    tl.store(at, before + values, mask=t < end)
