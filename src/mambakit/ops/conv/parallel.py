"""The causal convolution in PyTorch alone, with nothing done one sequence after another.

Shifted products are parallel in time already. For a pack the past of each sequence is laid
before its inputs, so that a window that ends at one of them meets no other sequence.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .._packing import bounds
from . import reference

# An operator, so that a graph that a compiler made looks at the values in every call.
torch.library.define("mambakit::checked_bounds", "(Tensor cu_seqlens, SymInt steps) -> Tensor")


@torch.library.impl("mambakit::checked_bounds", "CPU")
def _(cu_seqlens: Tensor, steps: int) -> Tensor:
    bounds("causal_conv1d", cu_seqlens, steps)
    return cu_seqlens.clone()


@torch.library.register_fake("mambakit::checked_bounds")
def _(cu_seqlens: Tensor, steps: int) -> Tensor:
    return torch.empty_like(cu_seqlens)


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
        return reference.conv(x, weight, bias, state, silu)
    _, l, d = x.shape
    w, s = weight.shape[1], cu_seqlens.shape[0] - 1
    cu_seqlens = torch.ops.mambakit.checked_bounds(cu_seqlens, l)

    ranks = torch.arange(s, device="cpu")
    rank = torch.repeat_interleave(ranks, cu_seqlens.diff(), output_size=l)
    window = torch.arange(1 - w, 0, device="cpu")
    # sequence k has the pasts of k + 1 sequences before it, its own among them
    places = torch.arange(l, device="cpu") + (rank + 1) * (w - 1)
    begins = (cu_seqlens[:-1] + (ranks + 1) * (w - 1))[:, None] + window
    ends = (cu_seqlens[1:] + (ranks + 1) * (w - 1))[:, None] + window
    places, begins, ends = (t.flatten().to(x.device) for t in (places, begins, ends))

    inputs = x.new_zeros(1, l + s * (w - 1), d).index_copy(1, places, x)
    if state is not None:
        past = state.transpose(1, 2).to(x.dtype).flatten(0, 1)
        inputs = inputs.index_copy(1, begins, past[None])

    wide = torch.promote_types(x.dtype, torch.float32)
    taps = weight.to(wide)
    y = x.new_zeros(d, dtype=wide) if bias is None else bias.to(wide)
    count = inputs.shape[1] - (w - 1)
    for k in range(w):
        y = torch.addcmul(y, inputs[:, k : k + count].to(wide), taps[:, k])
    # windows that end in a past are left out before silu: its slope may be NaN there
    y = y.index_select(1, places - (w - 1))
    if silu:
        y = F.silu(y)
    return y.to(x.dtype), inputs[0, ends].view(s, w - 1, d).transpose(1, 2)
