"""Run the convolution's CUDA kernels (``forward.cu``, ``backward.cu``) on tensors.

Tensors whose channels are neighbours in memory are read where they lie; others are copied once.
"""

import ctypes
from collections.abc import Iterator
from functools import cache, lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ... import _cuda, _native, _spans

FORWARD = Path(__file__).with_name("forward.cu")
BACKWARD = Path(__file__).with_name("backward.cu")

_TYPES = {
    torch.float32: "float",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float64: "double",
}

# A run of fewer steps would mostly read the steps before it.
_FEWEST_STEPS = 8
_MOST_WAVES = 4

_int, _pointer = ctypes.c_int64, ctypes.c_void_p


class _Rows(ctypes.Structure):
    _fields_ = [("data", _pointer), ("batch", _int), ("time", _int)]


class _Parameter(ctypes.Structure):
    _fields_ = [("data", _pointer), ("channel", _int), ("tap", _int), ("dtype", _int)]


class _Arguments(ctypes.Structure):
    # Arguments in common.cuh, field by field.
    _fields_ = [
        *((name, _int) for name in ("b", "l", "d", "splits", "steps")),
        *((name, _Rows) for name in ("x", "past")),
        *((name, _Parameter) for name in ("weight", "bias")),
        *((name, _Rows) for name in ("y", "last", "dy", "dlast", "dx", "dpast")),
        *((name, _pointer) for name in ("sums", "dweight", "dbias", "spans")),
    ]


class Shape(NamedTuple):
    """How a kernel lies on the GPU; ``common.cuh`` says what the words mean."""

    bytes: int  # that a lane loads at once
    rows: int
    warps: int
    blocks: int


FORWARD_SHAPE = Shape(bytes=8, rows=16, warps=4, blocks=4)
PACKED_FORWARD_SHAPE = Shape(bytes=8, rows=12, warps=4, blocks=4)  # more would spill
BACKWARD_SHAPE = Shape(bytes=8, rows=6, warps=6, blocks=2)


class Build(NamedTuple):
    """One build of a kernel's file, and what a launch of it must know."""

    defines: _cuda.Defines
    channels: int  # that a warp has
    warps: int
    blocks: int


def specialisations() -> Iterator[tuple[Path, _cuda.Defines]]:
    """List the builds that a Mamba block's convolution of width 4 asks for."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for aligned in (True, False):
            yield FORWARD, build(FORWARD_SHAPE, dtype, 4, True, aligned).defines
            yield BACKWARD, build(BACKWARD_SHAPE, dtype, 4, True, aligned).defines
    for source, shape in ((FORWARD, PACKED_FORWARD_SHAPE), (BACKWARD, BACKWARD_SHAPE)):
        yield source, build(shape, torch.bfloat16, 4, True, True, packed=True).defines


@cache
def build(
    shape: Shape, dtype: torch.dtype, w: int, silu: bool, aligned: bool, packed: bool = False
) -> Build:
    """Choose the build for a dtype, a width, an activation and the alignment of rows."""
    usual = w <= 8  # wider windows take all the registers there are, for one channel
    channels = shape.bytes // dtype.itemsize if aligned and usual else 1
    blocks = shape.blocks if w <= 4 else 1
    # 16 rows without SiLU would spill on compute capability 10.0
    rows = min(shape.rows, 16 if silu else 14) if usual else 1
    defines = (
        ("TYPE", _TYPES[dtype]),
        ("WIDTH", str(w)),
        ("CHANNELS", str(channels)),
        ("SILU", str(int(silu))),
        ("ROWS", str(rows)),
        ("WARPS", str(shape.warps)),
        ("BLOCKS", str(blocks)),
        *((("PACKED", "1"),) if packed else ()),
    )
    return Build(defines, 32 * channels, shape.warps, blocks)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    silu: bool,
    *,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return ``y`` (b, l, d) and the last state (b, d, w - 1), both in the dtype of ``x``.

    ``cu_seqlens`` (s+1), int64 on the CPU, says where the sequences of a pack begin and where
    the last one ends; ``state`` and the last state are then (s, d, w - 1). No sequence may be
    empty.

    Raises:
        RuntimeError: The kernel cannot be compiled or launched here; the message says why.
    """
    x, past = _rows(x, x.dtype), _state_rows(state, x.dtype)
    y, last = x.new_empty(x.shape), _new_state_rows(x, weight, cu_seqlens)
    if y.numel() == 0:
        return y, (last.zero_() if past is None else last.copy_(past)).transpose(1, 2)
    aligned = _aligned(x, past, y, last)
    packed = cu_seqlens is not None
    shape = PACKED_FORWARD_SHAPE if packed else FORWARD_SHAPE
    chosen = build(shape, x.dtype, weight.shape[1], silu, aligned, packed)
    grid, arguments, _table = _arguments(x, weight, bias, past, chosen, cu_seqlens)
    arguments.y, arguments.last = _place(y), _place(last)
    _launch(FORWARD, "conv_forward", x, chosen, grid, arguments)
    return y, last.transpose(1, 2)


def backward(
    dy: Tensor,
    dlast: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    silu: bool,
    *,
    dx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return the gradients of ``x``, ``weight``, ``bias`` and ``state``, each in its dtype.

    ``dx``, of the dtype of ``x``, is where the first is written if its channels are neighbours
    in memory; ``None`` makes room for it. ``cu_seqlens`` says that this is a pack, as in
    ``forward``.

    Raises:
        RuntimeError: The kernels cannot be compiled or launched here; the message says why.
    """
    d, w = weight.shape
    x, past = _rows(x, x.dtype), _state_rows(state, x.dtype)
    dy, late = _rows(dy, x.dtype), _state_rows(dlast, x.dtype)
    if dx is None or dx.stride(2) != 1:
        dx = x.new_empty(x.shape)
    dweight = weight.new_empty(d, w)
    dbias = None if bias is None else bias.new_empty(d)
    dpast = None if state is None else _new_state_rows(x, weight, cu_seqlens)
    if dx.numel() == 0:
        dweight.zero_()
        if dbias is not None:
            dbias.zero_()
        if dpast is not None:
            dpast = dpast.zero_() if late is None else dpast.copy_(late)
    else:
        aligned = _aligned(x, past, dy, late, dx, dpast)
        chosen = build(BACKWARD_SHAPE, x.dtype, w, silu, aligned, cu_seqlens is not None)
        grid, arguments, _table = _arguments(x, weight, bias, past, chosen, cu_seqlens)
        wide = torch.promote_types(x.dtype, torch.float32)
        sums = x.new_empty(arguments.b * arguments.splits, w + 1, d, dtype=wide)
        arguments.dy, arguments.dlast = _place(dy), _place(late)
        arguments.dx, arguments.dpast = _place(dx), _place(dpast)
        arguments.sums, arguments.dweight = sums.data_ptr(), dweight.data_ptr()
        arguments.dbias = None if dbias is None else dbias.data_ptr()
        _launch(BACKWARD, "conv_backward", x, chosen, grid, arguments)
        _launch(BACKWARD, "conv_reduce", x, chosen, -(-(w + 1) * d // 32), arguments)
    return (
        dx,
        dweight,
        dbias,
        None if state is None or dpast is None else dpast.transpose(1, 2).to(state.dtype),
    )


def _arguments(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    past: Tensor | None,
    chosen: Build,
    cu_seqlens: Tensor | None,
) -> tuple[int, _Arguments, Tensor | None]:
    """Return the number of blocks, the arguments of both directions, and a pack's spans.

    The spans must live until the kernels that read them are launched.
    """
    b, l, d = x.shape
    tiles = -(-d // chosen.channels)
    room = chosen.blocks * _cuda.multiprocessors(x.get_device())
    splits, steps = _cut(b * tiles, l, chosen.warps, weight.shape[1] - 1, room)
    table = None
    if cu_seqlens is not None:
        spans = _cut_pack(_spans.bytes_of(cu_seqlens), steps * chosen.warps)
        splits, table = len(spans), _spans.send(_spans.words_of(spans), x)
    arguments = _Arguments(
        *(b, l, d, splits, steps),
        *(_place(x), _place(past)),
        _Parameter(weight.data_ptr(), *weight.stride(), _native.DTYPE_CODES[weight.dtype]),
        *(() if bias is None else (_bias(bias),)),
    )
    arguments.spans = None if table is None else table.data_ptr()
    return b * splits * tiles, arguments, table


@lru_cache(maxsize=16)
def _cut_pack(cu_seqlens: bytes, most: int) -> _spans.Spans:
    """Cut each sequence into as few spans of at most ``most`` steps as do, and evenly."""
    starts = _spans.starts_of(cu_seqlens)
    lengths = np.diff(starts)
    spans = _spans.cut(starts, -(-lengths // -(-lengths // most)))
    return spans[np.argsort(-spans["steps"], kind="stable")]


@lru_cache(maxsize=4096)
def _cut(units: int, l: int, warps: int, past: int, room: int) -> tuple[int, int]:
    """Cut time so that the blocks fill the GPU: how many blocks, and steps for each warp.

    ``units`` blocks would be there uncut, and ``room`` of them run at once. The best cut does
    the least work that is not needed: seats that stay empty in the last wave of blocks, and
    ``past`` steps that every run reads for its neighbour.
    """

    def cost(splits: int) -> float:
        steps = -(-l // (splits * warps))
        waves = units * splits / room
        return (steps + past) * splits * -(-units * splits // room) / waves

    most = max(1, min(-(-l // (warps * _FEWEST_STEPS)), _MOST_WAVES * room // units))
    splits = min(range(1, most + 1), key=cost)
    steps = -(-l // (splits * warps))
    return -(-l // (steps * warps)), steps


def _launch(
    source: Path, entry: str, x: Tensor, chosen: Build, blocks: int, arguments: _Arguments
) -> None:
    kernel = _cuda.kernel(source, entry, chosen.defines, x.get_device())
    kernel.launch((blocks, 1, 1), 32 * chosen.warps, arguments)


def _aligned(*rows: Tensor | None) -> bool:
    """Say whether every row starts, and every row ends, on a multiple of 16 bytes."""
    for t in rows:
        if t is not None:
            batch, time, _ = t.stride()
            if t.data_ptr() % 16 or (batch | time | t.shape[2]) * t.element_size() % 16:
                return False
    return True


def _place(rows: Tensor | None) -> _Rows:
    return _Rows() if rows is None else _Rows(rows.data_ptr(), *rows.stride()[:2])


def _bias(bias: Tensor) -> _Parameter:
    return _Parameter(bias.data_ptr(), bias.stride(0), 0, _native.DTYPE_CODES[bias.dtype])


def _rows(t: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``t`` (b, rows, d) in a dtype, with channels that are neighbours in memory."""
    if t.dtype != dtype:
        t = t.to(dtype)
    return t if t.stride(2) == 1 or t.shape[2] == 1 else t.contiguous()


def _state_rows(state: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if state is None else _rows(state.transpose(1, 2), dtype)


def _new_state_rows(x: Tensor, weight: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    rows = x.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    return x.new_empty(rows, weight.shape[1] - 1, x.shape[2])
