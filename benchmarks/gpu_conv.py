"""The causal convolution on a GPU beside its floor, PyTorch's compiler and causal_conv1d."""

import importlib.util
from collections.abc import Iterator

import torch
from torch import Tensor

from . import gpu
from .conv import Convolution, _check, _forward, _forward_backward, _ours, _shifts
from .rows import Row

CASES = [
    (8, 2048, 2048, 4),
    (64, 2048, 512, 4),
    (1, 2048, 65536, 4),
    (1, 5120, 8192, 4),
    (1, 2048, 2048, 4),
]


def run(rounds: int, cases: str = "") -> Iterator[Row]:
    """Yield the rows: each case forward, then forward and backward, in bf16."""
    convolutions: dict[str, Convolution] = {
        "fused": _ours,
        "compiled shifts": torch.compile(_shifts, dynamic=False),
    }
    if importlib.util.find_spec("causal_conv1d") is not None:
        convolutions["causal_conv1d"] = _causal_conv1d
    for shape in CASES:
        case = f"(b, d, l, w) = {shape}, bf16"
        if cases not in case:
            continue
        drawn = [_draw(*shape, seed) for seed in range(gpu.sets(_draw(*shape, 0)))]
        check = _check(drawn[0][:3], drawn[0][3])
        for name, wrap, passes in (
            ("forward", _forward, 2),  # x, y
            ("forward + backward", _forward_backward, 5),  # x, y; x, dy, dx
        ):
            calls = {
                subject: [wrap(convolve, tensors[:3], tensors[3]) for tensors in drawn]
                for subject, convolve in convolutions.items()
            }
            times = gpu.interleave_replays(calls, rounds=rounds)
            moved = passes * drawn[0][3].nbytes
            times["floor"] = [moved / gpu.bytes_a_second()] * rounds
            for subject, samples in times.items():
                yield Row(
                    "gpu conv",
                    f"{name}, {case}",
                    subject,
                    "ms",
                    [1e3 * s for s in samples],
                    check=check if subject == "fused" else None,
                )


def _draw(b: int, d: int, l: int, w: int, seed: int) -> tuple[Tensor, ...]:
    generator = torch.Generator(gpu.DEVICE).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=gpu.DEVICE)

    # the block convolves one half of in_proj's output, with float32 weights
    x = normal(b, l, 2 * d).bfloat16()[..., :d].requires_grad_()
    weight, bias = normal(d, w).requires_grad_(), normal(d).requires_grad_()
    return x, weight, bias, normal(b, l, d).bfloat16()


def _causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    from causal_conv1d import causal_conv1d_fn

    return causal_conv1d_fn(x.mT, weight, bias, activation="silu").mT
