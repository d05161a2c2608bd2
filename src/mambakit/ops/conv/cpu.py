"""Call the compiled convolution (``cpu.cpp``) on tensors."""

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .. import _native

_int, _pointer = ctypes.c_int64, ctypes.c_void_p
# How cpu.cpp takes a tensor (b, rows, d), the two parameters, and all sizes.
_ROWS: list[Any] = [_pointer, _int, _int]
_PARAMETERS: list[Any] = [_pointer, ctypes.c_int32, _int, _int, _pointer, ctypes.c_int32, _int]
_SIZES: list[Any] = [
    ctypes.c_int32, ctypes.c_bool, ctypes.c_int32, *[_int] * 5, _pointer,
]  # fmt: skip


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

    With ``cu_seqlens``, int64 on the CPU, ``x`` is a pack and there is a state for each
    sequence.

    Raises:
        RuntimeError: The CPU library is missing, or there was no memory to work in.
    """
    return forward_in(_native.library(), x, weight, bias, state, silu, cu_seqlens)


def backward(
    dy: Tensor,
    dlast: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    silu: bool,
    *,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return the gradients of ``x``, ``weight``, ``bias`` and ``state``, each in its dtype.

    Raises:
        RuntimeError: The CPU library is missing, or there was no memory to work in.
    """
    return backward_in(_native.library(), dy, dlast, x, weight, bias, state, silu, cu_seqlens)


def forward_in(
    library: ctypes.CDLL,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    silu: bool,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run ``forward`` in the library of one instruction set."""
    x, past = _rows(x, x.dtype), _state_rows(state, x.dtype)
    y, last = x.new_empty(*x.shape), _new_state_rows(x, weight, cu_seqlens)
    done = _functions(library)[0](
        *_sizes(x, weight, silu, cu_seqlens),
        *_place(x),
        *_parameters(weight, bias),
        *_place(past),
        y.data_ptr(),
        last.data_ptr(),
    )
    _check_memory(done)
    return y, last.transpose(1, 2)


def backward_in(
    library: ctypes.CDLL,
    dy: Tensor,
    dlast: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    silu: bool,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Run ``backward`` in the library of one instruction set."""
    x, past = _rows(x, x.dtype), _state_rows(state, x.dtype)
    dy, dpast = _rows(dy, x.dtype), _state_rows(dlast, x.dtype)
    wide = torch.promote_types(x.dtype, torch.float32)
    dx = x.new_empty(*x.shape)
    dweight = x.new_empty(weight.shape, dtype=wide)
    dbias = x.new_empty(x.shape[2], dtype=wide)
    dstate = None if state is None else _new_state_rows(x, weight, cu_seqlens)
    done = _functions(library)[1](
        *_sizes(x, weight, silu, cu_seqlens),
        *_place(dy),
        *_place(dpast),
        *_place(x),
        *_parameters(weight, bias),
        *_place(past),
        dx.data_ptr(),
        dweight.data_ptr(),
        dbias.data_ptr(),
        None if dstate is None else dstate.data_ptr(),
    )
    _check_memory(done)
    return (
        dx,
        dweight.to(weight.dtype),
        None if bias is None else dbias.to(bias.dtype),
        None if state is None or dstate is None else dstate.transpose(1, 2).to(state.dtype),
    )


@cache
def _functions(library: ctypes.CDLL) -> tuple[Any, Any]:
    forward, backward = library.mk_conv_forward, library.mk_conv_backward
    forward.argtypes = [*_SIZES, *_ROWS, *_PARAMETERS, *_ROWS, _pointer, _pointer]
    backward.argtypes = [*_SIZES, *_ROWS * 3, *_PARAMETERS, *_ROWS, *[_pointer] * 4]
    forward.restype = backward.restype = ctypes.c_bool
    return forward, backward


def _sizes(
    x: Tensor, weight: Tensor, silu: bool, cu_seqlens: Tensor | None
) -> tuple[int | None, ...]:
    code = _native.DTYPE_CODES[x.dtype]
    starts = None if cu_seqlens is None else cu_seqlens.data_ptr()
    return (
        code, silu, torch.get_num_threads(), *x.shape, weight.shape[1],
        _count(x, cu_seqlens), starts,
    )  # fmt: skip


def _count(x: Tensor, cu_seqlens: Tensor | None) -> int:
    """Return how many sequences there are."""
    return x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def _rows(t: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``t`` (b, rows, d) in a dtype, with channels that are neighbours in memory."""
    if t.dtype != dtype:
        t = t.to(dtype)
    return t if t.stride(2) == 1 or t.shape[2] == 1 else t.contiguous()


def _state_rows(state: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if state is None else _rows(state.transpose(1, 2), dtype)


def _new_state_rows(x: Tensor, weight: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    return x.new_empty(_count(x, cu_seqlens), weight.shape[1] - 1, x.shape[2])


def _place(rows: Tensor | None) -> tuple[int | None, int, int]:
    return (None, 0, 0) if rows is None else (rows.data_ptr(), rows.stride(0), rows.stride(1))


def _parameters(weight: Tensor, bias: Tensor | None) -> tuple[int | None, ...]:
    matrix = weight.data_ptr(), _native.DTYPE_CODES[weight.dtype], *weight.stride()
    if bias is None:
        return *matrix, None, 0, 0
    return *matrix, bias.data_ptr(), _native.DTYPE_CODES[bias.dtype], bias.stride(0)


def _check_memory(done: bool) -> None:
    if not done:
        raise RuntimeError("causal_conv1d: there is not enough memory to work in")
