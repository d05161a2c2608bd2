"""Run RMSNorm's CUDA kernel (``norm.cu``) on tensors.

Tensors whose rows are dense and lie evenly in memory are read where they lie; others are copied
once.
"""

import ctypes
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _cuda

SOURCE = Path(__file__).with_name("norm.cu")

_TYPES = {torch.float32: "float", torch.bfloat16: "bf16", torch.float16: "fp16"}
DTYPES = frozenset(_TYPES)

# Numbers of a row that a lane has in registers: half or twice as many are 1 or 2 % slower.
_NUMBERS = 16
_WARPS, _FEWEST_WARPS = 32, 4  # the most and the fewest of a block
_LANES = 1024  # of a multiprocessor: more would leave a lane too few registers

_int, _pointer = ctypes.c_int64, ctypes.c_void_p


class _Arguments(ctypes.Structure):
    # Arguments in norm.cu, field by field.
    _fields_ = [
        *(("rows", _int), ("width", _int)),
        *(("x", _pointer), ("x_row", _int)),
        *(("addend", _pointer), ("addend_row", _int)),
        *((name, _pointer) for name in ("gain", "sum", "y")),
        ("eps", ctypes.c_double),
    ]


class Build(NamedTuple):
    """One build of the kernel, and what a launch of it must know."""

    defines: _cuda.Defines
    rows: int  # of a block
    threads: int


def specialisations() -> Iterator[_cuda.Defines]:
    """List builds for all dtypes and widths of every kind."""
    wide, short = torch.float32, torch.bfloat16
    for gain in _TYPES:
        yield build(wide, gain, gain, 2048, True).defines
        yield build(wide, None, gain, 2048, True).defines
    for width in (256, 768, 16384, 40000):
        for aligned in (True, False):
            yield build(wide, short, short, width, aligned).defines
            yield build(short, short, short, width, aligned).defines


@cache
def build(
    stream: torch.dtype,
    addend: torch.dtype | None,
    gain: torch.dtype,
    width: int,
    aligned: bool,
) -> Build:
    """Choose the build for dtypes, a width and the alignment of rows; no addend is ``None``."""
    total = stream if addend is None else torch.promote_types(stream, addend)
    dtypes = (stream, addend or stream, total, gain)
    # so that neighbouring lanes' accesses touch, whatever the longest dtype is
    vector = 16 // max(dtype.itemsize for dtype in dtypes) if aligned else 1
    share = 32 * _NUMBERS
    warps = min(_WARPS, -(-width // share))
    long = width > _WARPS * share
    packets = -(-min(width, warps * share) // (32 * warps * vector))
    rows = max(1, _FEWEST_WARPS // warps)
    threads = 32 * warps * rows
    defines = (
        *zip(("STREAM", "ADDEND", "SUM", "GAIN"), (_TYPES[d] for d in dtypes), strict=True),
        ("ADDS", str(int(addend is not None))),
        ("VECTOR", str(vector)),
        ("PACKETS", str(packets)),
        ("WARPS", str(warps)),
        ("ROWS", str(rows)),
        ("LONG", str(int(long))),
        ("BLOCKS", str(max(1, _LANES // threads))),
    )
    return Build(defines, rows, threads)


@cache
def _kernel(device_index: int, *choice: Any) -> tuple[Any, Build]:
    """Return the kernel of the ``build`` for what was chosen by, and that build."""
    chosen = build(*choice)
    return _cuda.kernel(SOURCE, "rms_norm", chosen.defines, device_index), chosen


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """Return ``x`` (*batch, m) normalised over its last axis, in the dtype of ``gain`` (m).

    Raises:
        RuntimeError: The kernel cannot be compiled or launched here; the message says why.
    """
    y = _like(x, gain.dtype)
    if y.numel():
        _launch(x, None, gain, eps, None, y)
    return y


def add_rms_norm(x: Tensor, addend: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return ``x + addend``, of one shape, and that normalised.

    Raises:
        RuntimeError: The kernel cannot be compiled or launched here; the message says why.
    """
    total = _like(x, torch.promote_types(x.dtype, addend.dtype))
    y = _like(x, gain.dtype)
    if y.numel():
        _launch(x, addend, gain, eps, total, y)
    return total, y


def _launch(
    x: Tensor,
    addend: Tensor | None,
    gain: Tensor,
    eps: float,
    total: Tensor | None,
    y: Tensor,
) -> None:
    # a layer of a token pays for each step here
    width = gain.shape[0]
    rows = y.numel() // width
    gain = gain.contiguous()
    x, x_row = _rows(x, width)
    arguments = _Arguments(rows, width, x.data_ptr(), x_row)
    bits = x.data_ptr() | gain.data_ptr() | x_row * x.itemsize
    dtype = None
    if addend is not None and total is not None:
        addend, addend_row = _rows(addend, width)
        arguments.addend, arguments.addend_row = addend.data_ptr(), addend_row
        arguments.sum = total.data_ptr()
        bits |= addend.data_ptr() | addend_row * addend.itemsize
        dtype = addend.dtype
    arguments.gain, arguments.y, arguments.eps = gain.data_ptr(), y.data_ptr(), eps
    aligned = bits % 16 == 0 and width % 8 == 0
    kernel, chosen = _kernel(x.get_device(), x.dtype, dtype, gain.dtype, width, aligned)
    kernel.launch((-(-rows // chosen.rows), 1, 1), chosen.threads, arguments)


def _like(x: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


def _rows(t: Tensor, width: int) -> tuple[Tensor, int]:
    """Return a tensor whose rows are dense, and how far one is from the next."""
    if t.is_contiguous():
        return t, width
    t = t.reshape(-1, width)
    if t.stride(1) != 1 and width > 1:
        t = t.contiguous()
    return t, t.stride(0)
