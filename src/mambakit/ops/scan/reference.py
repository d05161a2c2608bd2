"""The selective scan, one time step for each turn of a loop: the definition of the operation.

    h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t
    y_t = (C_t . h_t + D x_t) silu(gate_t)

Every other implementation is judged against this file. It is slow on purpose, and all of
autograd works on it: second derivatives, forward mode, ``torch.func``.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from .._packing import bounds


def scan(
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
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Follow the recurrence; shapes as in ``selective_scan``, checked there."""
    if cu_seqlens is None:
        return _scan_rows(x, dt, A, B, C, D, gate, dt_bias, state, dt_softplus)
    ends = bounds("selective_scan", cu_seqlens, x.shape[1])
    found = [
        _scan_rows(
            x[:, start:stop], dt[:, start:stop], A,
            B if B.ndim == 2 else B[:, start:stop], C if C.ndim == 2 else C[:, start:stop], D,
            None if gate is None else gate[:, start:stop], dt_bias,
            None if state is None else state[k : k + 1], dt_softplus,
        )
        for k, (start, stop) in enumerate(pairwise(ends))
    ]  # fmt: skip
    ys, lasts = zip(*found, strict=True)
    return torch.cat(ys, dim=1), torch.cat(lasts)


def _scan_rows(
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
) -> tuple[Tensor, Tensor]:
    """Follow the recurrence where each row of the batch is one sequence."""
    wide = torch.promote_types(x.dtype, torch.float32)
    b, l, d = x.shape
    signal, step, A = x.to(wide), dt.to(wide), A.to(wide)
    if dt_bias is not None:
        step = step + dt_bias.to(wide)
    if dt_softplus:
        step = softplus(step)
    h = (
        x.new_zeros(b, d, A.shape[1], dtype=wide)
        if state is None
        else state.to(wide, copy=True)
    )

    ys = []
    for t in range(l):
        decay = torch.exp(step[:, t, :, None] * A)  # (b, d, n)
        drive = (step[:, t] * signal[:, t])[:, :, None] * _at(B, t, d).to(wide)  # (b, d, n)
        h = decay * h + drive
        # a product and a sum: autocast and TF32 would round a matrix product
        ys.append((h * _at(C, t, d).to(wide)).sum(-1))
    if ys:
        y = torch.stack(ys, dim=1)
    else:  # no step joined the inputs to y and h, yet their gradients are zeros, not None
        h = h + _nothing_of(signal, step, A, B)
        y = signal + _nothing_of(h, C)
    if D is not None:
        y = y + D.to(wide) * signal
    if gate is not None:
        y = y * F.silu(gate.to(wide))
    return y.to(x.dtype), h


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)); PyTorch's own is the identity from 20 on, too early for float64."""
    return F.softplus(x, threshold=40.0)


def _nothing_of(*tensors: Tensor) -> Tensor | int:
    """Give 0 as a function of the tensors, whatever values are in them."""
    return sum(tensor.flatten()[:0].sum(dtype=tensors[0].dtype) for tensor in tensors)


def _at(M: Tensor, t: int, d: int) -> Tensor:
    """Row t of B or C, for every channel: (d, n), (b, 1, n) or (b, d, n)."""
    if M.ndim == 2:
        return M
    if M.ndim == 3:
        return M[:, t, None]
    return M[:, t].repeat_interleave(d // M.shape[2], dim=1)
