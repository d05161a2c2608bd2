"""The paper's figure 8: the scan beside attention, on one sequence that grows."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import gpu
from .gpu_scan import _check, _forward_backward, _ours, inputs
from .rows import Row

LENGTHS = tuple(2**k for k in range(9, 20))  # 512 .. 524,288
CHANNELS, HEADS = 1024, 16
# Attention is quadratic: at the next length one call takes a second, and at the last several.
_LONGEST_ATTENTION = 65536
_BACKENDS = {
    "cuDNN attention": SDPBackend.CUDNN_ATTENTION,
    "flash attention": SDPBackend.FLASH_ATTENTION,
}


def run(rounds: int, cases: str = "") -> Iterator[Row]:
    """Yield forward and backward of the scan and of attention at each length."""
    for l in LENGTHS:
        case = f"forward + backward, b 1, d {CHANNELS}, l {l}"
        if cases not in case:
            continue
        one = inputs(1, CHANNELS, l, 16, torch.bfloat16)
        check = _check(one)
        calls = {"scan": [_forward_backward(_fused, one)]}
        if l <= _LONGEST_ATTENTION:
            calls |= {name: [_attention(l, kind)] for name, kind in _BACKENDS.items()}
        for subject, samples in gpu.interleave_replays(calls, rounds=rounds).items():
            yield Row(
                "figure 8",
                case,
                subject,
                "ms",
                [1e3 * s for s in samples],
                check=check if subject == "scan" else None,
            )
        del one, calls
        torch.cuda.empty_cache()


def _fused(i: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    return _ours(i, backend="fused")


def _attention(l: int, backend: SDPBackend) -> gpu.Call:
    """Causal attention of 16 heads of 64 channels, in memory as a projection writes it."""
    shape = (1, l, HEADS, CHANNELS // HEADS)
    q, k, v, dy = (
        torch.randn(shape, dtype=torch.bfloat16, device=gpu.DEVICE).transpose(1, 2)
        for _ in range(4)
    )
    wanted = [t.requires_grad_() for t in (q, k, v)]

    def call() -> object:
        with sdpa_kernel(backend):
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return torch.autograd.grad(y, wanted, dy)

    return call
