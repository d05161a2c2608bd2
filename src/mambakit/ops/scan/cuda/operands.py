"""The operands of a scan as its CUDA kernels see them: where they lie, and what is specialised.

Shapes were checked before, gradients are arranged after. A tensor whose last axis is dense is
passed as it lies, whatever its other strides; others are copied once. ``A``, ``D``,
``dt_bias``, the states and constant ``B`` and ``C`` are small and are brought to the scalar
that the kernels compute in, float32. If ``x`` is float64 that is float64, and everything is
brought to it; where it is not, a float64 operand becomes float32.

Kernels are compiled for each combination of dtypes and forms that occurs. Where one is rarer
than worth a kernel of its own (``gate`` of another dtype than ``x``, ``B`` of another than
``C``), both are copied to float32.
"""

import ctypes

import torch
from torch import Tensor

from ..._cuda import Defines

# The types of _scalars.cuh.
TYPES = {
    torch.float32: "float",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float64: "double",
}

# Steps between two saved states; chunks of time are whole multiples of the first.
CHECKPOINT_STEPS, FEWER_STEPS = 64, 32


def checkpoint_shape(
    b: int, l: int, d: int, n: int, sequences: int | None = None, steps: int = CHECKPOINT_STEPS
) -> tuple[int, int, int, int]:
    """Return the shape of the states that ``forward`` saves: one every ``steps`` steps.

    Of a pack of so many sequences, of which number k begins at step ``a``, those from number
    ``a // steps + k`` on are that sequence's. One that has room for a state more than it needs
    keeps its last state there.
    """
    if sequences is not None:
        return (1, l // steps + sequences, d, n)
    return (b, (l + steps - 1) // steps, d, n)


def steps_between(checkpoints: Tensor, b: int, l: int, d: int, n: int, packed: bool) -> int:
    """Return how many steps lie between the states that ``forward`` has saved."""
    rows = checkpoints.numel() // (b * d * n)
    # up to 32 steps both leave one state, and either reading is right
    if packed or rows == -(-l // CHECKPOINT_STEPS):
        return CHECKPOINT_STEPS
    return FEWER_STEPS


def warp_channels(n: int, narrow: bool = False) -> int:
    """Return how many channels a warp owns: WARP_CHANNELS in common.cuh."""
    padded = 1 << (n - 1).bit_length()
    states = padded if padded < 4 else 8 if padded > 128 else 2 if narrow else 4
    return 2 * (32 // (padded // states))


class Rows(ctypes.Structure):
    """Rows of time in a tensor (b, l, d) or (b, l, g, n); strides count elements."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("batch", ctypes.c_int64),
        ("time", ctypes.c_int64),
        ("group", ctypes.c_int64),
    ]


class Operands(ctypes.Structure):
    """What every kernel of the scan is given: Operands in common.cuh, field by field."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("b", "l", "d", "n", "g")),
        *((name, Rows) for name in ("x", "dt", "gate", "B", "C")),
        *(
            (name, ctypes.c_void_p)
            for name in ("A", "D", "dt_bias", "B_constant", "C_constant", "state")
        ),
    ]


class Call:
    """One call's operands for the kernels, kept alive as long as this object is.

    ``sizes`` is (b, l, d, n), ``groups`` the number of groups, ``scalar`` the dtype computed
    in, ``stored_x`` that of x, gate and y in memory, ``stored_dt`` that of dt, ``stored_B``
    that of B and C where they have rows. ``defines`` is what the kernels are specialised on.
    With ``packed`` the one row of the batch holds several sequences.
    """

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
        dy: Tensor | None = None,
        packed: bool = False,
    ) -> None:
        b, l, d = x.shape
        n = A.shape[1]
        self.sizes = (b, l, d, n)
        self.packed = packed
        self.device = x.device
        self.scalar = torch.float64 if x.dtype == torch.float64 else torch.float32
        self.alive: list[Tensor] = []
        self.groups = B.shape[2] if B.ndim == 4 else C.shape[2] if C.ndim == 4 else 1
        self.group_channels = d // self.groups
        self.piece = min(8, warp_channels(n))

        self.stored_x = self._common(x, gate, dy)
        self.stored_dt = self._common(dt)
        token_B = None if B.ndim == 2 else B
        token_C = None if C.ndim == 2 else C
        self.stored_B = self._common(token_B, token_C)

        operands = self.operands = Operands(b, l, d, n, self.groups)
        self._aligned = self.group_channels % self.piece == 0
        self._aligned_coefficients = n & (n - 1) == 0
        operands.x = self.rows(x, self.stored_x)
        operands.dt = self.rows(dt, self.stored_dt)
        if gate is not None:
            operands.gate = self.rows(gate, self.stored_x)
        self.dy = Rows() if dy is None else self.rows(dy, self.stored_x)
        operands.A = self.scalars(A)
        operands.D = self.scalars(D)
        operands.dt_bias = self.scalars(dt_bias)
        operands.state = self.scalars(state)
        if token_B is None:
            operands.B_constant = self.scalars(B)
        else:
            operands.B = self.token_rows(B)
        if token_C is None:
            operands.C_constant = self.scalars(C)
        else:
            operands.C = self.token_rows(C)

        self.defines: Defines = (
            ("STATES", str(n)),
            ("X_TYPE", TYPES[self.stored_x]),
            ("DT_TYPE", TYPES[self.stored_dt]),
            ("COEFFICIENT_TYPE", TYPES[self.stored_B]),
            ("SOFTPLUS", str(int(dt_softplus))),
            ("GATE", str(int(gate is not None))),
            ("CONSTANT_B", str(int(token_B is None))),
            ("CONSTANT_C", str(int(token_C is None))),
            ("ALIGNED", str(int(self._aligned))),
            ("ALIGNED_COEFFICIENTS", str(int(self._aligned_coefficients))),
            *((("PACKED", "1"),) if packed else ()),
        )

    def rows(self, tensor: Tensor, dtype: torch.dtype) -> Rows:
        """Return where the rows of a (b, l, d) tensor lie, once of ``dtype`` and dense."""
        tensor = self._dense(tensor, dtype)
        batch, time = self._strides(tensor)
        size = tensor.itemsize
        if self._aligned:
            piece = min(16, self.piece * size)
            self._aligned = (tensor.data_ptr() | batch * size | time * size) % piece == 0
        return Rows(tensor.data_ptr(), batch, time, 0)

    def token_rows(self, tensor: Tensor) -> Rows:
        """Return where the rows of a (b, l, n) or (b, l, g, n) tensor lie."""
        tensor = self._dense(tensor, self.stored_B)
        batch, time = self._strides(tensor)
        group = tensor.stride(2) if tensor.ndim == 4 else 0
        size = tensor.itemsize
        if self._aligned_coefficients:
            unit = min(16, min(self.sizes[3], 4) * size)
            together = tensor.data_ptr() | batch * size | time * size | group * size
            self._aligned_coefficients = unit >= 4 and together % unit == 0
        return Rows(tensor.data_ptr(), batch, time, group)

    def output(self, tensor: Tensor) -> Rows:
        """Return where the rows of a tensor (b, l, d) or (b, l, g, n) to be written lie."""
        group = tensor.stride(2) if tensor.ndim == 4 else 0
        return Rows(tensor.data_ptr(), *self._strides(tensor), group)

    def scalars(self, tensor: Tensor | None) -> int | None:
        """Return where a dense copy in the scalar lies, or ``None``."""
        if tensor is None:
            return None
        return self._dense(tensor, self.scalar, whole=True).data_ptr()

    def _strides(self, tensor: Tensor) -> tuple[int, int]:
        """Return the strides of batch and time; sequences of a pack lie at their steps."""
        batch, time = tensor.stride()[:2]
        return (0 if self.packed else batch), time

    def _dense(self, tensor: Tensor, dtype: torch.dtype, whole: bool = False) -> Tensor:
        """Return the tensor in ``dtype`` with a dense last axis: itself, or a copy."""
        if tensor.dtype != dtype:
            tensor = tensor.to(dtype)
        if whole:
            tensor = tensor.contiguous()
            if tensor.data_ptr() % 16:  # kernels read states 16 bytes at a time
                tensor = tensor.clone()
        elif tensor.stride(-1) != 1:
            tensor = tensor.contiguous()
        self.alive.append(tensor)
        return tensor

    def _common(self, *tensors: Tensor | None) -> torch.dtype:
        """Return the dtype in which the kernels read all of these."""
        dtypes = {tensor.dtype for tensor in tensors if tensor is not None}
        if self.scalar == torch.float64 or torch.float64 in dtypes or len(dtypes) != 1:
            return self.scalar
        return dtypes.pop()
