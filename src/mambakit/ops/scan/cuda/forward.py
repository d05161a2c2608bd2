"""Run the selective scan forward on a CUDA GPU (``forward.cu``)."""

import ctypes
import math
from collections.abc import Iterator
from functools import cache, lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ... import _cuda, _spans
from ..._cuda import Defines
from . import packs
from .operands import (
    CHECKPOINT_STEPS,
    TYPES,
    Call,
    Operands,
    Rows,
    checkpoint_shape,
    warp_channels,
)

SOURCE = Path(__file__).with_name("forward.cu")

# As in forward.cu.
_STAGES = 2
_JOIN_THREADS = 256


class _Arguments(ctypes.Structure):
    # Arguments in forward.cu, field by field.
    _fields_ = [
        ("operands", Operands),
        ("y", Rows),
        *(
            (name, ctypes.c_void_p)
            for name in ("last_state", "checkpoints", "starts", "sums", "flags")
        ),
        *(
            (name, ctypes.c_int64)
            for name in ("chunks", "chunk_steps", "blocks", "checkpoint_bits")
        ),
        ("spans", ctypes.c_void_p),
        ("listed", ctypes.c_int64),
    ]


class Plan(NamedTuple):
    """How a scan is cut.

    ``wide`` is how many warps lie side by side in time, 0 if they walk; ``narrow``, whether
    they have half as many channels; ``handed_on``, whether chunks hand their states on from
    block to block or are joined. Of a pack, ``chunks`` is how many its longest sequence has.
    """

    wide: int = 0
    narrow: bool = False
    chunks: int = 1
    handed_on: bool = False
    chunk_steps: int = 0


def cut(plan: Plan, l: int) -> Plan:
    """Return the plan with at most as many chunks, each of whole checkpoints.

    Of a pack, ``l`` is the length of the longest sequence.
    """
    steps = -(-l // (plan.chunks * CHECKPOINT_STEPS)) * CHECKPOINT_STEPS
    return plan._replace(chunks=-(-l // steps), chunk_steps=steps)


# What a step takes, in nanoseconds of an H200 with n = 16: for a warp that walks, with 1, 2, ..
# of them on each quarter of a multiprocessor; for a block of warps side by side, with 1, 2 of
# them on each multiprocessor. By (wide, narrow).
_STEP_COSTS = {
    (0, False): (78, 113, 160, 205),
    (0, True): (58, 76, 104, 130),
    (4, False): (28.7, 43.3),
    (4, True): (18.5, 25.5),
    (8, False): (22.9,),
    (8, True): (14,),
}
_MANY_CHANNELS_COST = 2.1  # a warp that walks with 64 channels by one with 16
_STATES_COST = 0.8  # scan_states by scan_forward: as many exponentials
_START_COST = 4000  # of a kernel, until its blocks are at work
_BLOCK_COST = 1500
_JOIN_COST = 16000  # of all that scan_forward waits for, beside its steps


def _cost(plan: Plan, b: int, d: int, n: int, groups: int, multiprocessors: int) -> float:
    """Return about how many nanoseconds a plan takes; infinity if it makes no sense."""
    step_costs = _STEP_COSTS[plan.wide, plan.narrow]
    warps = 1 if plan.wide else _channel_warps(n)  # with channels of their own
    channels = warp_channels(n, plan.narrow)
    blocks = b * groups * -(-(d // groups) // (warps * channels))
    quarters = 1 if plan.wide else 4
    room = max(1, quarters * len(step_costs) // warps) * multiprocessors
    if plan.handed_on and blocks < room:
        return float("inf")  # they would wait for each other
    waves, rest = divmod(blocks * plan.chunks, room)
    step = waves * step_costs[-1]
    if rest:
        together = -(-rest // multiprocessors) * warps
        step += step_costs[-(-together // quarters) - 1]
    if not plan.wide and channels > 32:
        step *= _MANY_CHANNELS_COST
    joined = plan.chunks > 1 and not plan.handed_on
    if joined:
        step *= 1 + _STATES_COST
    starts = _START_COST + (waves + bool(rest)) * _BLOCK_COST
    return step * plan.chunk_steps + starts + joined * _JOIN_COST


def _plans(l: int, n: int, may_be_wide: bool) -> Iterator[Plan]:
    # four warps side by side with 64 channels each wait for memory
    widths = () if not may_be_wide else (8,) if warp_channels(n) > 32 else (4, 8)
    for wide in (0, *widths):
        for narrow in _narrow(n, wide):
            yield cut(Plan(wide, narrow), l)
            for chunks in (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64):
                if chunks * 128 > l:
                    break
                yield cut(Plan(wide, narrow, chunks, handed_on=True), l)
                if not wide and chunks * 256 <= l:
                    yield cut(Plan(wide, narrow, chunks), l)


@cache
def choose(
    b: int, l: int, d: int, n: int, groups: int, may_be_wide: bool, multiprocessors: int
) -> Plan:
    """Choose how to cut a scan, from its sizes and the GPU's."""
    return min(
        _plans(l, n, may_be_wide),
        key=lambda plan: _cost(plan, b, d, n, groups, multiprocessors),
    )


@lru_cache(maxsize=1024)
def choose_for_pack(
    cu_seqlens: bytes, d: int, n: int, groups: int, may_be_wide: bool, multiprocessors: int
) -> Plan:
    """Choose how to cut a pack, from the lengths of its sequences and the GPU's size."""
    lengths = np.diff(_spans.starts_of(cu_seqlens))
    longest, sequences = int(lengths.max()), len(lengths)

    @cache
    def work_of(steps: int) -> packs.Work:
        return packs.work(lengths, steps)

    def cost(plan: Plan) -> float:
        warps = 1 if plan.wide else _channel_warps(n)
        channels = warp_channels(n, plan.narrow)
        columns = groups * -(-(d // groups) // (warps * channels))
        step_costs = _STEP_COSTS[plan.wide, plan.narrow]
        quarters = 1 if plan.wide else 4
        room = max(1, quarters * len(step_costs) // warps) * multiprocessors
        if plan.handed_on and columns * sequences < room:
            return float("inf")  # they would wait for each other
        work = work_of(plan.chunk_steps)
        if plan.handed_on:
            # chunks of a sequence run one after another, and the last ones alone
            steps = max(work.steps * columns / room, longest) + plan.chunk_steps / 2
        else:
            steps = packs.makespan(work, columns, room)
        together = -(-work.steps * columns // (math.ceil(steps) * multiprocessors)) * warps
        step = step_costs[min(-(-together // quarters), len(step_costs)) - 1]
        if not plan.wide and channels > 32:
            step *= _MANY_CHANNELS_COST
        joined = plan.chunks > 1 and not plan.handed_on
        if joined:
            step *= 1 + _STATES_COST * work.carried_steps / work.steps
        waves = -(-work.spans * columns // room)
        return step * steps + _START_COST + waves * _BLOCK_COST + joined * _JOIN_COST

    return min(_plans(longest, n, may_be_wide), key=cost)


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
    plan: Plan | None = None,
    steps: int = CHECKPOINT_STEPS,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the scan; return ``y``, the last state and, if ``save``, the checkpoints.

    ``cu_seqlens`` (s+1), int64 on the CPU, says where the sequences of a pack begin and where
    the last one ends; ``state`` and the last state are then (s, d, n). ``plan`` says how to cut
    the work; ``None`` leaves that to ``choose`` or ``choose_for_pack``. ``steps``, a power of
    two, is how many lie between two checkpoints. Neither the batch nor a sequence may be empty.

    Raises:
        RuntimeError: The kernels cannot be compiled or run on this GPU.
    """
    packed = cu_seqlens is not None
    call = Call(x, dt, A, B, C, D, gate, dt_bias, state, dt_softplus, packed=packed)
    b, l, d, n = call.sizes
    device = x.device.index
    pack = b"" if cu_seqlens is None else _spans.bytes_of(cu_seqlens)
    sequences = b if cu_seqlens is None else len(cu_seqlens) - 1
    if plan is None:
        may_be_wide = _may_be_wide(call.defines, _cuda.shared_memory(device)[0])
        rest = (d, n, call.groups, may_be_wide, _cuda.multiprocessors(device))
        plan = choose_for_pack(pack, *rest) if packed else choose(b, l, *rest)
    defines, warps, shared_bytes = _specialised(call.defines, plan.wide, plan.narrow)
    y = x.new_empty(b, l, d, dtype=call.stored_x)
    last_state = x.new_empty(sequences, d, n, dtype=call.scalar)
    saved = checkpoint_shape(b, l, d, n, sequences if packed else None, steps)
    checkpoints = x.new_empty(saved if save else 0, dtype=call.scalar)
    arguments = _Arguments(
        call.operands,
        call.output(y),
        last_state.data_ptr(),
        checkpoints.data_ptr() if save else None,
    )
    arguments.chunks, arguments.chunk_steps = plan.chunks, plan.chunk_steps
    arguments.checkpoint_bits = steps.bit_length() - 1
    if packed:
        table = packs.table(pack, plan.chunk_steps, x, handed_on=plan.handed_on)
    else:
        table = packs.batch(b, plan.chunks)

    # blocks that walk have warps side by side over channels
    block_channels = warp_channels(n, plan.narrow) * (1 if plan.wide else warps)
    arguments.blocks = -(-call.group_channels // block_channels)
    columns = arguments.blocks * call.groups

    def launch(entry: str, taken: packs.Listed) -> None:
        arguments.spans, arguments.listed = taken.address, taken.number
        if entry == "scan_join":
            blocks, threads, room = -(-taken.number * d * n // _JOIN_THREADS), _JOIN_THREADS, 0
        else:
            blocks, threads, room = columns * taken.number, warps * 32, shared_bytes
        _cuda.kernel(SOURCE, entry, defines, device, room).launch(
            (blocks, 1, 1), threads, arguments, room
        )

    if plan.chunks > 1:
        starts = x.new_empty(table.chunks, d, n, dtype=call.scalar)
        arguments.starts = starts.data_ptr()
        if plan.handed_on:
            states = columns * table.chunks * (1 if plan.wide else warps)
            flags = x.new_zeros(states, dtype=torch.int32)
            arguments.flags = flags.data_ptr()
        else:
            sums = x.new_empty(table.chunks, d, dtype=call.scalar)
            arguments.sums = sums.data_ptr()
            launch("scan_states", table.first)
            launch("scan_join", table.cut)
    launch("scan_wide" if plan.wide else "scan_forward", table.spans)
    return y.to(x.dtype), last_state, checkpoints


_SHARED_MEMORY = 228 * 1024  # of an H100's multiprocessor
_SIZES = {"float": 4, "bf16": 2, "fp16": 2, "double": 8}


def _channel_warps(n: int) -> int:
    return 4 if n > 16 else 2  # CHANNEL_WARPS in forward.cu


def _narrow(n: int, wide: int) -> tuple[bool, ...]:
    """Return which values of ``narrow`` there are; few states side by side need registers."""
    return (False,) if not 2 < n <= 16 else (True,) if wide and n <= 8 else (False, True)


@cache
def _may_be_wide(defines: Defines, shared_memory: int) -> bool:
    given = dict(defines)
    fits = int(given["STATES"]) <= 16 and given["X_TYPE"] != "double"
    return fits and _specialised(defines, 8, False).shared_bytes <= shared_memory


class _Kernels(NamedTuple):
    """The defines of one specialisation, the warps of a block and its shared memory."""

    defines: Defines
    warps: int
    shared_bytes: int


@cache
def _specialised(defines: Defines, wide: int, narrow: bool) -> _Kernels:
    # the sizes of WarpShared, CoefficientShared, WalkShared and WideShared in forward.cu
    given = dict(defines)
    n = int(given["STATES"])
    channels = warp_channels(n, narrow)
    pairs = channels // 2
    lanes = 32 // pairs
    padded = 1 << (n - 1).bit_length()
    x, dt, B = (_SIZES[given[f"{k}_TYPE"]] for k in ("X", "DT", "COEFFICIENT"))
    real = 8 if given["X_TYPE"] == "double" else 4
    piece = 1 if channels == 2 and real == 8 else min(8, channels)
    steps = 8 if channels > 32 else max(16, 32 // (channels // piece))
    gate = given["GATE"] == "1"
    copy = 4 * pairs + 8
    stride = 2 * copy - 4 if lanes > 1 else copy - 4
    y_stride = channels + (4 if channels == 8 else 8)
    stage = steps * channels * (x + dt + gate * x) + (0 if gate else 8 * x)
    warp = _STAGES * stage + steps * (stride + y_stride) * real
    tokens = (given["CONSTANT_B"] == "0") + (given["CONSTANT_C"] == "0")
    coefficients = _STAGES * max(16, steps * tokens * padded * B)
    if wide:
        warps = wide
        elements = 2 * padded // lanes
        shared = wide * (warp + coefficients) + (4 * wide + 2) * 32 * elements * real
        blocks = 8 // wide
    else:
        warps = _channel_warps(n)
        shared = warps * warp + coefficients
        blocks = min(16 // warps, _SHARED_MEMORY // (shared + 1024)) if real == 4 else 1
    more = (
        ("NARROW", str(int(narrow))),
        ("WIDE", str(wide)),
        ("BLOCKS", str(blocks)),
        ("SHARED_BYTES", str(shared)),
    )
    return _Kernels(defines + more, warps, shared)


def specialisations() -> Iterator[Defines]:
    """Yield the defines of the kernels that a model is likely to ask for."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for n in (16, 1, 8, 64):
            if n == 16 or dtype == torch.bfloat16:
                given = (
                    ("STATES", str(n)),
                    *((f"{k}_TYPE", TYPES[dtype]) for k in ("X", "DT", "COEFFICIENT")),
                    ("SOFTPLUS", "1"),
                    ("GATE", "1"),
                    ("CONSTANT_B", "0"),
                    ("CONSTANT_C", "0"),
                    ("ALIGNED", "1"),
                    ("ALIGNED_COEFFICIENTS", str(int(n > 1))),
                )
                # eight warps side by side are the code of four
                for wide in (0, 4) if n <= 16 else (0,):
                    for narrow in _narrow(n, wide)[: 2 if dtype == torch.bfloat16 else 1]:
                        yield _specialised(given, wide, narrow).defines
                    if n == 16 and dtype == torch.bfloat16:
                        packed = (*given, ("PACKED", "1"))
                        yield _specialised(packed, wide, False).defines
