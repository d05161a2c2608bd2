"""Hand tensors to the compiled scan (``cpu.cpp``) and take its results back.

This is the border between torch and C: shapes were checked before, gradients are arranged
after. Tensors whose last axis is dense are passed as they lie, whatever their other strides;
others are copied once. ``A``, ``D``, ``dt_bias``, the states and constant ``B`` and ``C`` are
small and are brought to the scalar that the kernel computes in. So is everything if ``x`` is
float64, and a float64 tensor if it is not: the kernel reads no float64 while it computes in
float32, and nothing else while it computes in float64.
"""

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _native

# Steps between two checkpoints: tile_steps in cpu.cpp. A constant, so that shapes are known
# where the library is not.
TILE_STEPS = 24


class Gradients(NamedTuple):
    """What ``backward`` returns; ``None`` where the operand was ``None``."""

    dx: Tensor
    ddt: Tensor
    dA: Tensor
    dB: Tensor
    dC: Tensor
    dD: Tensor | None
    dgate: Tensor | None
    ddt_bias: Tensor | None
    dstate: Tensor | None


class _Rows(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("batch", ctypes.c_int64),
        ("time", ctypes.c_int64),
        ("group", ctypes.c_int64),
        ("dtype", ctypes.c_int64),
    ]


_POINTER = ctypes.c_void_p


class _Arguments(ctypes.Structure):
    # ScanArguments in cpu.cpp, field by field.
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("b", "l", "d", "n", "g", "softplus", "threads")),
        ("sequences", ctypes.c_int64),
        ("starts", _POINTER),
        *((name, _Rows) for name in ("x", "dt", "gate", "B", "C")),
        *((name, _POINTER) for name in ("A", "D", "dt_bias", "B_constant", "C_constant")),
        ("state", _POINTER),
        ("checkpoints", _POINTER),
        ("y", _Rows),
        ("last_state", _POINTER),
        ("dy", _Rows),
        ("dlast_state", _POINTER),
        *((name, _Rows) for name in ("dx", "ddt", "dgate", "dB", "dC")),
        *((name, _POINTER) for name in ("dA", "dD", "ddt_bias", "dB_constant", "dC_constant")),
        ("dstate", _POINTER),
    ]


_NO_ROWS = _Rows()


def checkpoint_shape(
    b: int, l: int, d: int, n: int, sequences: int | None = None
) -> tuple[int, int, int, int]:
    """Return the shape of the states that ``forward`` saves: one before each tile of time.

    Those of a pack of ``sequences`` come in the order of time, and some room may be left.
    """
    if sequences is not None:
        return (b, l // TILE_STEPS + sequences, n, d)
    return (b, (l + TILE_STEPS - 1) // TILE_STEPS, n, d)


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

    With ``cu_seqlens``, int64 on the CPU, the inputs are a pack and there is a state for each
    sequence.

    Raises:
        RuntimeError: The CPU library is missing, or there was no memory to work in.
    """
    call = _Call(x, dt, A, B, C, D, gate, dt_bias, state, dt_softplus)
    call.pack(cu_seqlens)
    b, l, d, n = call.sizes
    sequences = None if cu_seqlens is None else call.arguments.sequences
    y = x.new_empty(b, l, d)
    last_state = x.new_empty(call.arguments.sequences, d, n, dtype=call.scalar)
    kept = checkpoint_shape(b, l, d, n, sequences) if save else (0,)
    checkpoints = x.new_empty(kept, dtype=call.scalar)

    call.arguments.y = call.rows(y)
    call.arguments.last_state = last_state.data_ptr()
    if save:
        call.arguments.checkpoints = checkpoints.data_ptr()
    call.run("mk_scan_forward")
    return y, last_state, checkpoints


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
) -> Gradients:
    """Return the gradient of each operand, in its own dtype, from what ``forward`` saved.

    Raises:
        RuntimeError: The CPU library is missing, or there was no memory to work in.
    """
    call = _Call(x, dt, A, B, C, D, gate, dt_bias, state, dt_softplus)
    call.pack(cu_seqlens)
    d, n = call.sizes[2:]
    arguments = call.arguments

    def dense(like: Tensor) -> Tensor:
        return torch.empty(like.shape, dtype=call.stored(like), device=like.device)

    def scalars(like: Tensor | None) -> Tensor | None:
        if like is None:
            return None
        return torch.empty(like.shape, dtype=call.scalar, device=like.device)

    dx, ddt = dense(x), dense(dt)
    dgate = None if gate is None else dense(gate)
    dA = torch.empty(d, n, dtype=call.scalar, device=x.device)
    dD, ddt_bias, dstate = scalars(D), scalars(dt_bias), scalars(state)
    arguments.dx, arguments.ddt = call.rows(dx), call.rows(ddt)
    arguments.dy = call.rows(call.dense_rows(dy))
    arguments.dgate = call.rows(dgate)
    arguments.checkpoints = call.pointer(checkpoints)
    arguments.dlast_state = call.pointer(call.scalars(dlast_state))
    arguments.dA, arguments.dD = dA.data_ptr(), call.pointer(dD)
    arguments.ddt_bias, arguments.dstate = call.pointer(ddt_bias), call.pointer(dstate)

    dB, arguments.dB, arguments.dB_constant = call.coefficient_gradient(B)
    dC, arguments.dC, arguments.dC_constant = call.coefficient_gradient(C)

    call.run("mk_scan_backward")
    return Gradients(
        dx,
        ddt.to(dt.dtype),
        dA.to(A.dtype),
        call.gathered(dB, B),
        call.gathered(dC, C),
        None if D is None or dD is None else dD.to(D.dtype),
        None if gate is None or dgate is None else dgate.to(gate.dtype),
        None if dt_bias is None or ddt_bias is None else ddt_bias.to(dt_bias.dtype),
        None if state is None or dstate is None else dstate.to(state.dtype),
    )


class _Call:
    """The operands of one call as C sees them, kept alive until it returns."""

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
    ) -> None:
        b, l, d = x.shape
        n = A.shape[1]
        self.sizes = (b, l, d, n)
        self.wide = x.dtype == torch.float64
        self.scalar = torch.float64 if self.wide else torch.float32
        self.alive: list[Tensor] = []
        self.groups = next((t.shape[2] for t in (B, C) if t.ndim == 4), 1)
        arguments = self.arguments = _Arguments(
            b, l, d, n, self.groups, dt_softplus, torch.get_num_threads()
        )
        arguments.sequences = b
        arguments.x = self.rows(self.dense_rows(x))
        arguments.dt = self.rows(self.dense_rows(dt))
        if gate is not None:
            arguments.gate = self.rows(self.dense_rows(gate))
        arguments.A = self.pointer(self.scalars(A))
        arguments.D = self.pointer(self.scalars(D))
        arguments.dt_bias = self.pointer(self.scalars(dt_bias))
        arguments.state = self.pointer(self.scalars(state))
        if B.ndim == 2:
            arguments.B_constant = self.pointer(self.scalars(B))
        else:
            arguments.B = self.token_rows(self.dense_rows(B))
        if C.ndim == 2:
            arguments.C_constant = self.pointer(self.scalars(C))
        else:
            arguments.C = self.token_rows(self.dense_rows(C))

    def pack(self, cu_seqlens: Tensor | None) -> None:
        """Tell where the sequences of a pack lie, if it is one."""
        if cu_seqlens is not None:
            self.alive.append(cu_seqlens)
            self.arguments.sequences = cu_seqlens.shape[0] - 1
            self.arguments.starts = cu_seqlens.data_ptr()

    def run(self, name: str) -> None:
        function = getattr(_native.library(), name)
        function.restype = ctypes.c_bool
        if not function(ctypes.byref(self.arguments)):
            raise RuntimeError("selective_scan: there is not enough memory to work in")

    def rows(self, tensor: Tensor | None) -> _Rows:
        if tensor is None:
            return _NO_ROWS
        batch, time, _ = tensor.stride()
        return _Rows(tensor.data_ptr(), batch, time, 0, _native.DTYPE_CODES[tensor.dtype])

    def token_rows(self, tensor: Tensor) -> _Rows:
        batch, time = tensor.stride()[:2]
        group = tensor.stride(2) if tensor.ndim == 4 else 0
        return _Rows(tensor.data_ptr(), batch, time, group, _native.DTYPE_CODES[tensor.dtype])

    def coefficient_gradient(self, like: Tensor) -> tuple[Tensor, _Rows, int | None]:
        """Return room for dB or dC, and where the kernel puts it: in rows or for all time."""
        b, l, d, n = self.sizes
        if like.ndim == 2:
            gradient = like.new_empty(d, n, dtype=self.scalar)
            return gradient, _NO_ROWS, gradient.data_ptr()
        if like.ndim == 3 and self.groups > 1:
            # it is shared by the groups of the other coefficient, and each writes its own part
            gradient = like.new_empty(b, l, self.groups, n, dtype=self.scalar)
        else:
            gradient = like.new_empty(like.shape, dtype=self.stored(like))
        return gradient, self.token_rows(gradient), None

    @staticmethod
    def gathered(gradient: Tensor, like: Tensor) -> Tensor:
        """Return dB or dC as its coefficient is: summed over the groups that share it."""
        if gradient.ndim > like.ndim:
            gradient = gradient.sum(2)
        return gradient.to(like.dtype)

    def stored(self, tensor: Tensor) -> torch.dtype:
        """Return the dtype in which the kernel reads the tensor and writes its gradient."""
        narrow = not self.wide and tensor.dtype != torch.float64
        return tensor.dtype if narrow else self.scalar

    def dense_rows(self, tensor: Tensor) -> Tensor:
        """Return the tensor with its last axis dense: itself, or a copy that stays alive."""
        tensor = tensor.to(self.stored(tensor))
        if tensor.stride(-1) != 1:
            tensor = tensor.contiguous()
        self.alive.append(tensor)
        return tensor

    def scalars(self, tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        tensor = tensor.to(self.scalar).contiguous()
        self.alive.append(tensor)
        return tensor

    @staticmethod
    def pointer(tensor: Tensor | None) -> int | None:
        return None if tensor is None else tensor.data_ptr()
