"""Run the gradients of the selective scan on a CUDA GPU (``backward.cu``)."""

import ctypes
from collections.abc import Iterator
from functools import cache, lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ... import _cuda, _spans
from ..._cuda import Defines
from ..cpu import Gradients
from . import packs
from .operands import (
    CHECKPOINT_STEPS,
    FEWER_STEPS,
    TYPES,
    Call,
    Operands,
    Rows,
    steps_between,
    warp_channels,
)

SOURCE = Path(__file__).with_name("backward.cu")

# As in backward.cu and common.cuh.
_GROUP = 4
_TENSORS = 8
_PLACE_BYTES = 64

# Up to so many sums of dB and dC at a step a block makes one pass over channels.
_FEW_SUMS = 64
_THREADS = 256  # of scan_join_back and scan_add
# Where states are saved every FEWER_STEPS: so much shared memory has room for all tiles between
# two of them, and so many elements of x are little.
_ROOM = 227 * 1024
_LITTLE, _FEW_CHANNELS, _BRIEF, _SHORT = 2**26, 12288, 256, 1024
# Of a block of one_state.cuh, and how many there are on a multiprocessor.
_ONE_STATE_BYTES = (CHECKPOINT_STEPS + CHECKPOINT_STEPS // 8) * 32 * 8
_ONE_STATE_BLOCKS = 12

# What a multiprocessor has for threads' registers, and what the kernel may take of them.
_REGISTERS = 65536
_REGISTERS_PER_THREAD = 168


class _Arguments(ctypes.Structure):
    # Arguments in backward.cu, field by field.
    _fields_ = [
        ("operands", Operands),
        ("dy", Rows),
        *((name, ctypes.c_void_p) for name in ("checkpoints", "dlast_state")),
        *((name, Rows) for name in ("dx", "ddt", "dgate", "dB", "dC")),
        *(
            (name, ctypes.c_void_p)
            for name in (
                "dstate",
                "token_parts",
                "parts",
                "dA",
                "dD",
                "ddt_bias",
                "dB_constant",
                "dC_constant",
                "carries",
                "dt_sums",
                "flags",
            )
        ),
        *(
            (name, ctypes.c_int64)
            for name in (
                *("chunks", "chunk_steps", "first_steps", "tail"),
                *("columns", "passes"),
            )
        ),
        ("spans", ctypes.c_void_p),
        ("listed", ctypes.c_int64),
        ("bins", ctypes.c_void_p),
    ]


class Form(NamedTuple):
    """How scan_backward is built: what depends on the operands' kinds and the GPU's memory."""

    defines: Defines
    walkers: int
    threads: int  # of a block
    blocks: int  # on a multiprocessor
    shared_bytes: int
    carry_warps: int
    carry_bytes: int
    sums: int  # of dB and dC at a step


class Plan(NamedTuple):
    """How the work is cut: chunks of how many steps, and passes of a block over channels.

    ``first_steps`` is how many steps the first chunk has. The first ``tail`` chunks hand their
    gradients on from block to block, the others are joined. Of a pack, ``chunks`` is how many
    its longest sequence has, all joined, and ``share`` how many steps a block should have, of
    one or several.
    """

    chunks: int
    chunk_steps: int
    passes: int
    first_steps: int
    tail: int = 1
    share: int = 1


def cut(chunks: int, l: int, passes: int = 1) -> Plan:
    """Return the plan with at most that many joined chunks, each of whole checkpoints."""
    steps = -(-l // (chunks * CHECKPOINT_STEPS)) * CHECKPOINT_STEPS
    return Plan(-(-l // steps), steps, passes, steps)


def hand_on(chunk_steps: int, l: int, passes: int = 1, tail: int | None = None) -> Plan:
    """Return the plan whose chunks have that many steps, the first one what is left.

    ``chunk_steps`` must be whole checkpoints. The first chunk is worked on last, so that a
    short one leaves little of the GPU without work for long. All chunks hand on, or the first
    ``tail`` at most.
    """
    whole = -(-l // CHECKPOINT_STEPS) * CHECKPOINT_STEPS
    chunks = -(-whole // chunk_steps)
    first = whole - (chunks - 1) * chunk_steps
    return Plan(chunks, chunk_steps, passes, first, min(chunks, tail or chunks))


# The unit of time is one step of a full multiprocessor, 0.40 us of an H200 with n = 16 and a
# state every 64 steps; with one every 32 the plans are within 1 % of the best, too. So many of
# them take what a block does before its first tile, also where it waits for another's
# gradient, and launching two more kernels; scan_carries takes so much of a step of its own,
# and its blocks start together and wait for memory.
_START_COST = 20
_AWAITED_START_COST = 33
_JOIN_COST = 24
_CARRY_COST = 0.26
_CARRY_START_COST = 36
_HANDING_ON_COST = 1.02  # by the time that blocks take if none waits for another
# So many times what the GPU runs at once are even enough.
_EVEN = 16


def _carry_time(carried: float, chunk_steps: int) -> float:
    """Return how long scan_carries takes for so many blocks' chunks on each multiprocessor."""
    return _CARRY_COST * carried * (chunk_steps + _CARRY_START_COST)


def _time_handed_on(chosen: Plan, l: int, blocks: int, slots: int) -> int:
    """Return when the last block ends if each starts as soon as one before it has ended."""
    last = l - chosen.first_steps - (chosen.chunks - 2) * chosen.chunk_steps
    middle = [chosen.chunk_steps] * (chosen.chunks - 2)
    ends = {0: slots}  # how many slots become free when
    for steps in (last, *middle, chosen.first_steps):
        left = blocks
        while left:
            now = min(ends)
            slots_now = ends.pop(now)
            started = min(slots_now, left)
            if slots_now > started:
                ends[now] = slots_now - started
            end = now + steps + _START_COST
            ends[end] = ends.get(end, 0) + started
            left -= started
    return max(ends)


@cache
def plan(b: int, l: int, d: int, n: int, groups: int, form: Form, multiprocessors: int) -> Plan:
    """Choose how to cut the work, from its sizes, the kernel and the GPU's size."""
    slots = form.blocks * multiprocessors
    side_by_side = b * groups * -(-(d // groups) // (form.walkers * warp_channels(n)))

    def cost(chosen: Plan) -> float:
        if 1 < chosen.tail == chosen.chunks:
            return _HANDING_ON_COST * _time_handed_on(chosen, l, side_by_side, slots)
        waves = -(-side_by_side * chosen.chunks // slots)
        start = _START_COST if chosen.tail == 1 else _AWAITED_START_COST
        time = float(waves * (chosen.chunk_steps + start))
        if chosen.chunks > 1:
            carried = max(1.0, side_by_side * (chosen.chunks - chosen.tail) / slots)
            time += _JOIN_COST + _carry_time(carried, chosen.chunk_steps)
        return time

    checkpoints = -(-l // CHECKPOINT_STEPS)
    plans = [cut(chunks, l) for chunks in range(1, min(256, checkpoints) + 1)]
    # Fewer blocks would wait for each other. With many states a block takes several sets of
    # channels, which does better.
    if slots < side_by_side < _EVEN * slots and form.sums <= _FEW_SUMS:
        coarse = -(-checkpoints // 64)
        plans += [
            hand_on(k * CHECKPOINT_STEPS, l)
            for k in range(-(-checkpoints // 8), checkpoints, coarse)
        ]
    # Of chunks that take several rounds of blocks, as many as there are rounds may hand on.
    if side_by_side < slots and form.sums <= _FEW_SUMS:
        for joined in plans[1:]:
            rounds = -(-side_by_side * joined.chunks // slots)
            if rounds < joined.chunks:
                plans.append(hand_on(joined.chunk_steps, l, tail=rounds))
    chosen = min(plans, key=cost)

    # With many states the parts of dB and dC that each block leaves are large, so a block takes
    # as many sets of channels, one after another, as cost no time.
    def blocks_in_turn(passes: int) -> int:
        columns = -(-(d // groups) // (form.walkers * warp_channels(n) * passes))
        return -(-b * groups * columns * chosen.chunks // slots) * passes

    passes = 1
    if form.sums > _FEW_SUMS:
        passes = min(range(16, 0, -1), key=blocks_in_turn)
    return chosen._replace(passes=passes)


# So many shares of a pack there are for each block that the GPU runs at once, if sequences are
# short enough: the last ones leave little of it without work.
_SHARES = 8


@lru_cache(maxsize=1024)
def plan_for_pack(
    cu_seqlens: bytes, d: int, n: int, groups: int, form: Form, multiprocessors: int
) -> Plan:
    """Choose how to cut a pack, from its sequences' lengths, the kernel and the GPU's size."""
    lengths = np.diff(_spans.starts_of(cu_seqlens))
    whole = -(-lengths // CHECKPOINT_STEPS) * CHECKPOINT_STEPS  # a block works in these
    longest = int(whole.max())
    slots = form.blocks * multiprocessors
    columns = groups * -(-(d // groups) // (form.walkers * warp_channels(n)))

    def cost(steps: int) -> float:
        if steps == longest:
            return packs.makespan(packs.work(whole, steps, _START_COST), columns, slots)
        work = packs.work(whole, steps, _START_COST)
        carried = max(1.0, work.carried_steps * columns / (slots * steps))
        return _JOIN_COST + packs.makespan(work, columns, slots) + _carry_time(carried, steps)

    checkpoints = longest // CHECKPOINT_STEPS
    counts = {-(-checkpoints // chunks) for chunks in (*range(1, 16), *range(16, 257, 16))}
    steps = min(sorted(counts, reverse=True), key=lambda count: cost(count * CHECKPOINT_STEPS))
    steps *= CHECKPOINT_STEPS
    chunks = -(-int(lengths.max()) // steps)
    share = int(whole.sum()) * columns // (slots * _SHARES)
    passes = 1
    if form.sums > _FEW_SUMS:
        # as many as leave a block for every slot
        most = packs.work(lengths, steps).spans * columns // slots
        passes = max(1, min(16, most))
    return Plan(chunks, steps, passes, steps, share=max(1, share))


def steps_to_save(
    b: int, l: int, d: int, n: int, *, dtype: torch.dtype, packed: bool, block_bytes: int
) -> int:
    """Return how many steps should lie between two states that ``forward`` saves.

    With fewer nothing is run twice, which saves a tenth of this pass; but the states take twice
    as much, up to 64 MB more. That is for short sequences and few channels: where many of both
    are trained on, the states of all layers lie in memory at once.
    """
    runs_once = 8 < n <= 16 and dtype.itemsize == 2 and not packed and block_bytes >= _ROOM
    little = b * l * d <= _LITTLE and (l <= _SHORT or b * d <= _FEW_CHANNELS)
    # there is nothing to gain in a few microseconds
    return FEWER_STEPS if runs_once and little and l > _BRIEF else CHECKPOINT_STEPS


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
    dgate: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    plan: Plan | None = None,
) -> Gradients:
    """Return the gradient of each operand, in its own dtype, from what ``forward`` saved.

    ``dgate`` is room for the gate's, which is used if the kernel can write there.
    ``cu_seqlens`` (s+1) says that this is a pack, as in ``forward``. ``plan`` says how to cut
    the work, and ``None`` leaves that to ``plan()`` or ``plan_for_pack()``. Two runs with the
    same operands on the same GPU give the same bits. Neither the batch nor a sequence may be
    empty.

    Raises:
        RuntimeError: The kernels cannot be compiled or run on this GPU.
    """
    dy, x, dt, B, C = (_within_reach(tensor) for tensor in (dy, x, dt, B, C))
    gate = None if gate is None else _within_reach(gate)
    packed = cu_seqlens is not None
    call = Call(x, dt, A, B, C, D, gate, dt_bias, state, dt_softplus, dy, packed)
    b, l, d, n = call.sizes
    g, scalar, device = call.groups, call.scalar, x.device.index
    gpu = GPU(*_cuda.shared_memory(device), _cuda.hands_over_registers(device))
    steps = steps_between(checkpoints, b, l, d, n, packed)
    defines = (*call.defines, ("CHECKPOINT_STEPS", str(steps)))
    form = _form(defines, call.group_channels, gpu)
    pack = b"" if cu_seqlens is None else _spans.bytes_of(cu_seqlens)
    sequences = b if cu_seqlens is None else len(cu_seqlens) - 1
    if plan is None:
        rest = (d, n, g, form, _cuda.multiprocessors(device))
        plan = plan_for_pack(pack, *rest) if packed else _plan(b, l, *rest)
    if packed:
        table = packs.table(pack, plan.chunk_steps, x, share=plan.share)
    else:
        table = packs.batch(b, plan.chunks, plan.tail)
    columns = -(-call.group_channels // (form.walkers * warp_channels(n) * plan.passes))

    dx = x.new_empty(b, l, d, dtype=call.stored_x)
    ddt = x.new_empty(b, l, d, dtype=call.stored_dt)
    if gate is None:
        dgate = None
    elif dgate is None or not _may_be_written(dgate, call.stored_x):
        dgate = x.new_empty(b, l, d, dtype=call.stored_x)
    dA, dD, ddt_bias = (x.new_empty(shape, dtype=scalar) for shape in ((d, n), d, d))
    dB = x.new_empty(B.shape, dtype=scalar if B.ndim == 2 else call.stored_B)
    dC = x.new_empty(C.shape, dtype=scalar if C.ndim == 2 else call.stored_B)
    dstate = None if state is None else x.new_empty(sequences, d, n, dtype=scalar)
    # of dA, dD, ddt_bias, and of dB and dC where they are constant
    width = d * n * (1 + (B.ndim == 2) + (C.ndim == 2)) + 2 * d
    parts = x.new_empty(table.bins.number, width, dtype=scalar)
    token_parts = x.new_empty(g * columns, b, l, form.sums, dtype=scalar)

    arguments = _Arguments(call.operands, call.dy)
    arguments.checkpoints = call.scalars(checkpoints)
    arguments.dlast_state = call.scalars(dlast_state)
    arguments.dx, arguments.ddt = call.output(dx), call.output(ddt)
    if dgate is not None:
        arguments.dgate = call.output(dgate)
    if B.ndim == 2:
        arguments.dB_constant = dB.data_ptr()
    else:
        arguments.dB = call.output(dB)
    if C.ndim == 2:
        arguments.dC_constant = dC.data_ptr()
    else:
        arguments.dC = call.output(dC)
    arguments.dA, arguments.dD = dA.data_ptr(), dD.data_ptr()
    arguments.ddt_bias = ddt_bias.data_ptr()
    arguments.dstate = None if dstate is None else dstate.data_ptr()
    arguments.token_parts, arguments.parts = token_parts.data_ptr(), parts.data_ptr()
    arguments.chunks = table.bins.number // b
    arguments.chunk_steps, arguments.first_steps = plan.chunk_steps, plan.first_steps
    arguments.tail = plan.tail
    arguments.columns, arguments.passes = columns, plan.passes
    arguments.bins = table.bins.address

    def launch(entry: str, blocks: int, threads: int, shared_bytes: int = 0) -> None:
        _cuda.kernel(SOURCE, entry, form.defines, device, shared_bytes).launch(
            (blocks, 1, 1), threads, arguments, shared_bytes
        )

    blocks = columns * g * table.bins.number
    if plan.chunks > 1:
        carries = x.new_empty(table.chunks, d, n, dtype=scalar)
        arguments.carries = carries.data_ptr()
        if plan.tail > 1:
            flags = x.new_zeros(
                columns * g * b * plan.tail * plan.passes * form.walkers, dtype=torch.int32
            )
            arguments.flags = flags.data_ptr()
        if plan.tail < plan.chunks:
            dt_sums = x.new_empty(table.chunks, d, dtype=scalar)
            arguments.dt_sums = dt_sums.data_ptr()
            carry_blocks = -(-call.group_channels // (form.carry_warps * warp_channels(n)))
            carry_blocks *= g * table.later.number
            arguments.spans = table.later.address
            launch("scan_carries", carry_blocks, form.carry_warps * 32, form.carry_bytes)
            arguments.spans, arguments.listed = table.cut.address, table.cut.number
            launch("scan_join_back", -(-table.cut.number * d * n // _THREADS), _THREADS)
    arguments.spans = table.spans.address
    launch("scan_backward", blocks, form.threads, form.shared_bytes)
    padded = 1 << (n - 1).bit_length()
    items = g * b * l * form.sums // min(4, padded) + width
    launch("scan_add", -(-items // _THREADS), _THREADS)

    return Gradients(
        dx.to(x.dtype),
        ddt.to(dt.dtype),
        dA.to(A.dtype),
        dB.to(B.dtype),
        dC.to(C.dtype),
        None if D is None else dD.to(D.dtype),
        None if gate is None or dgate is None else dgate.to(gate.dtype),
        None if dt_bias is None else ddt_bias.to(dt_bias.dtype),
        None if state is None or dstate is None else dstate.to(state.dtype),
    )


_plan = plan


_FAR = 2**28  # elements


def _within_reach(tensor: Tensor) -> Tensor:
    """Return the tensor, or a copy if its rows lie more bytes apart than an int can tell."""
    return tensor.contiguous() if tensor.stride(1) >= _FAR else tensor


def _may_be_written(rows: Tensor, dtype: torch.dtype) -> bool:
    """Say whether rows of the dtype are dense and start where 16 bytes may be stored."""
    batch, time, channel = rows.stride()
    starts = rows.data_ptr() | batch * rows.itemsize | time * rows.itemsize
    return rows.dtype == dtype and channel == 1 and starts % 16 == 0 and time < _FAR


_SIZES = {"float": 4, "bf16": 2, "fp16": 2, "double": 8}


class GPU(NamedTuple):
    """What of a GPU decides how scan_backward is built: see ``_cuda``."""

    block_bytes: int
    bytes_in_all: int
    hands_over_registers: bool = False


_forms: dict[tuple[Defines, int, GPU], Form] = {}


def _form(defines: Defines, channels: int, gpu: GPU) -> Form:
    """Return how the kernel is built for a group of so many channels."""
    key = (defines, channels, gpu)
    found = _forms.get(key)
    if found is None:
        found = _forms[key] = _choose(*key)
    return found


def _choose(defines: Defines, channels: int, gpu: GPU) -> Form:
    """Choose the form in which most walkers are at work on a multiprocessor.

    Shorter tiles are worth less: what is done once for a tile is done more often. A second
    buffer pays with many states, or where no tile is run twice.
    """
    given = dict(defines)
    steps = int(given["CHECKPOINT_STEPS"])
    sizes = [_SIZES[given[f"{k}_TYPE"]] for k in ("X", "DT", "COEFFICIENT")]
    own = warp_channels(int(given["STATES"]))
    tokens = given["CONSTANT_B"] == given["CONSTANT_C"] == "0"
    pairs = given["ALIGNED"] == "1" and sizes[:2] == [2, 2]
    if given["STATES"] == "1" and tokens and pairs and "PACKED" not in given:
        blocks = min(_ONE_STATE_BLOCKS, gpu.bytes_in_all // (_ONE_STATE_BYTES + 1024))
        return _build(defines, 1, 1, 16, max(1, blocks), one_state=True)
    tiles = [(1, 16, 1.0), (1, 8, 0.75), (1, 4, 0.5)]
    if steps // 16 == 2 or _build(defines, 1, 1, 16).sums > _FEW_SUMS:
        tiles.append((2, 16, 1.05))
    forms = []
    for walkers in (8, 4, 2, 1):
        if walkers > 1 and walkers * own >= 2 * channels:
            continue  # half of them or more would have no channels
        threads = 32 * (walkers + max(1, walkers // 2))
        for buffers, tile, worth in tiles:
            form = _build(defines, walkers, buffers, tile)
            if max(form.shared_bytes, form.carry_bytes) > gpu.block_bytes:
                continue
            blocks = min(
                gpu.bytes_in_all // (form.shared_bytes + 1024),
                _REGISTERS // (threads * _REGISTERS_PER_THREAD),
                8 // walkers,
            )
            blocks = max(1, blocks)
            forms.append((worth * blocks * walkers, walkers, blocks, buffers, tile))
    if not forms:
        needed = _build(defines, 1, 1, 4).shared_bytes
        raise RuntimeError(
            f"selective_scan: the gradient of {given['STATES']} states needs {needed} "
            f"bytes of shared memory in a block, and this GPU has {gpu.block_bytes}"
        )
    _, walkers, blocks, buffers, tile = max(forms)
    # With 4-byte numbers this was slower; with other numbers of states it would spill.
    hand_over = gpu.hands_over_registers and walkers == 8 and sizes == [2] * 3
    hand_over &= own == 16 or given["STATES"] in ("8", "32")
    return _build(defines, walkers, buffers, tile, blocks, hand_over)


def _build(
    defines: Defines,
    walkers: int,
    buffers: int,
    tile: int,
    blocks: int = 1,
    hand_over: bool = False,
    one_state: bool = False,
) -> Form:
    given = dict(defines)
    n = int(given["STATES"])
    channels = warp_channels(n)
    lanes = 64 // channels
    padded = 1 << (n - 1).bit_length()
    per_lane = padded // lanes
    real = 8 if given["X_TYPE"] == "double" else 4
    x, dt, B = (_SIZES[given[f"{k}_TYPE"]] for k in ("X", "DT", "COEFFICIENT"))
    tokens = (given["CONSTANT_B"] == "0") + (given["CONSTANT_C"] == "0")
    sums = tokens * padded
    tiles = int(given["CHECKPOINT_STEPS"]) // tile
    slots = max(2, tiles // 2) + 1
    roles = 3 + (tiles > 2)
    over_states = _GROUP * sums <= 64 * per_lane
    stride = 2 * channels + 2
    own = (
        slots * (tile // _GROUP) * 64 * per_lane * real
        + (slots + 1) * tile * stride * real
        + buffers * 3 * tile * channels * max(x, dt)
        + (4 if over_states else tile * sums) * real
        + 8 * (_TENSORS + 2)
        + channels * real
    )
    own = -(-own // 16) * 16
    copies = 1 if padded >= 64 or real > 4 else per_lane
    copy = tile * padded + (padded if padded < 32 else 0)
    coefficients = 2 * roles * copies * copy * real if tokens else 4 * real
    shared = -(-(walkers * own + _PLACE_BYTES + coefficients) // 16) * 16

    own = tile * (2 * channels * (2 * x + dt) + stride * real)
    shared_C = 2 * B * (tile * padded if given["CONSTANT_C"] == "0" else 16)
    # four blocks on a multiprocessor, where that can be
    carry_warps = next((w for w in (4, 2) if w * own + shared_C <= 56 * 1024), 1)
    carry = -(-(carry_warps * own + shared_C) // 16) * 16
    threads = 32 * (walkers + (walkers if hand_over else max(1, walkers // 2)))
    if one_state:
        threads, shared = 32, _ONE_STATE_BYTES
    more = (
        ("TILE", str(tile)),
        ("WALKERS", str(walkers)),
        ("HAND_OVER", str(int(hand_over))),
        ("ONE_STATE", str(int(one_state))),
        ("STORED_BUFFERS", str(buffers)),
        ("SEVERAL_PASSES", str(int(sums > _FEW_SUMS))),
        ("BLOCKS", str(blocks)),
        ("CARRY_WARPS", str(carry_warps)),
        ("CARRY_BLOCKS", "4" if real == 4 else "1"),
        ("SHARED_BYTES", str(shared)),
        ("CARRY_BYTES", str(carry)),
    )
    return Form(defines + more, walkers, threads, blocks, shared, carry_warps, carry, sums)


def specialisations() -> Iterator[Defines]:
    """Yield the defines of the kernels that a model is likely to ask for, by GPU."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    for kilobytes, hopper, dtype, n, packed, steps in (
        *((227, True, bf16, n, 0, 64) for n in (16, 8, 32)),
        *((227, True, fp16, 16, 0, 64), (227, True, bf16, 16, 1, 64)),
        *((227, False, bf16, n, 0, 64) for n in (16, 1, 64)),
        *((227, False, fp32, 16, 0, 64), (163, False, bf16, 16, 0, 64)),
        *((99, False, bf16, 16, 0, 64), (163, False, bf16, 16, 1, 64)),
        *((227, hands_over, bf16, 16, 0, 32) for hands_over in (True, False)),
        *((227, hands_over, fp16, 16, 0, 32) for hands_over in (True, False)),
    ):
        kinds = (
            ("CHECKPOINT_STEPS", str(steps)),
            ("STATES", str(n)),
            *((f"{k}_TYPE", TYPES[dtype]) for k in ("X", "DT", "COEFFICIENT")),
            ("SOFTPLUS", "1"),
            ("GATE", "1"),
            ("CONSTANT_B", "0"),
            ("CONSTANT_C", "0"),
            ("ALIGNED", "1"),
            ("ALIGNED_COEFFICIENTS", str(int(n > 1))),
            *((("PACKED", "1"),) if packed else ()),
        )
        gpu = GPU(kilobytes * 1024, (kilobytes + 1) * 1024, hopper)
        yield _choose(kinds, 2048, gpu).defines
