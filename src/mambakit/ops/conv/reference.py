"""The causal convolution as w shifted products: the definition of the operation.

    y_t = act(bias + sum_k weight[:, k] x_{t-w+1+k})

Every kernel is judged against this file. It runs on any device, and all of autograd works on
it: second derivatives, forward mode, ``torch.func``.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from .._packing import bounds


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    silu: bool,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Add the shifted products; shapes as in ``causal_conv1d``, checked there."""
    if cu_seqlens is None:
        return _conv_rows(x, weight, bias, state, silu)
    ends = bounds("causal_conv1d", cu_seqlens, x.shape[1])
    found = [
        _conv_rows(
            x[:, start:stop], weight, bias, None if state is None else state[k : k + 1], silu
        )
        for k, (start, stop) in enumerate(pairwise(ends))
    ]
    ys, lasts = zip(*found, strict=True)
    return torch.cat(ys, dim=1), torch.cat([last.mT for last in lasts]).mT


def _conv_rows(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor]:
    """Add the shifted products where each row of the batch is one sequence."""
    wide = torch.promote_types(x.dtype, torch.float32)
    l, d = x.shape[1:]
    w = weight.shape[1]
    if state is None:
        inputs = F.pad(x, (0, 0, w - 1, 0))  # (b, w - 1 + l, d)
    else:
        inputs = torch.cat([state.transpose(1, 2).to(x.dtype), x], dim=1)
    taps = weight.to(wide)
    y = x.new_zeros(d, dtype=wide) if bias is None else bias.to(wide)
    for k in range(w):
        y = torch.addcmul(y, inputs[:, k : k + l].to(wide), taps[:, k])
    if silu:
        y = F.silu(y)
    # a copy, so that the state does not keep the whole input alive
    return y.to(x.dtype), inputs[:, l:].clone().transpose(1, 2)
