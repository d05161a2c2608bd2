"""The causal convolution beside PyTorch's own, as it is and compiled."""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from mambakit.ops import causal_conv1d

from .rows import Check, Row
from .timing import interleave

CASES = [
    ((1, 1536, 2048, 4), torch.float32),
    ((8, 384, 1024, 4), torch.float32),
    ((1, 1536, 16384, 4), torch.float32),
    ((1, 1536, 2048, 4), torch.bfloat16),
]
_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
_LIMITS = {torch.float32: 2e-6, torch.bfloat16: 8e-3}

Inputs = tuple[Tensor, Tensor, Tensor]
Convolution = Callable[[Tensor, Tensor, Tensor], Tensor]


def run(rounds: int) -> Iterator[Row]:
    """Yield the rows: each case forward, then forward and backward."""
    convolutions: dict[str, Convolution] = {
        "fused": _ours,
        "compiled shifts": torch.compile(_shifts, dynamic=False),
        "compiled conv1d": torch.compile(_conv1d, dynamic=False),
        "eager shifts": _shifts,
        "eager conv1d": _conv1d,
    }
    for shape, dtype in CASES:
        torch.manual_seed(0)
        b, d, l, w = shape
        # The block convolves one half of in_proj's output.
        x = torch.randn(b, l, 2 * d).to(dtype)[..., :d].requires_grad_()
        weight = torch.randn(d, w).to(dtype).requires_grad_()
        bias = torch.randn(d).to(dtype).requires_grad_()
        inputs, dy = (x, weight, bias), torch.randn(b, l, d).to(dtype)
        check = _check(inputs, dy)
        for name, wrap in (("forward", _forward), ("forward + backward", _forward_backward)):
            calls = {k: wrap(convolve, inputs, dy) for k, convolve in convolutions.items()}
            for subject, samples in interleave(calls, rounds=rounds, warm_up=2).items():
                yield Row(
                    "conv",
                    f"{name}, (b, d, l, w) = {shape}, {_NAMES[dtype]}",
                    subject,
                    "ms",
                    [1e3 * s for s in samples],
                    check=check if subject == "fused" else None,
                )


def _ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return causal_conv1d(x, weight, bias, activation="silu", backend="fused").y


def _conv1d(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    d, w = weight.shape
    y = F.conv1d(x.mT, weight.unsqueeze(1), bias, padding=w - 1, groups=d)
    return F.silu(y[..., : x.shape[1]]).mT


def _shifts(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Sum shifted copies of x: what a compiler turns into one loop over channels-last data."""
    w, l = weight.shape[1], x.shape[1]
    padded = F.pad(x, (0, 0, w - 1, 0))
    y = bias + padded[:, :l] * weight[:, 0]
    for k in range(1, w):
        y = y + padded[:, k : k + l] * weight[:, k]
    return F.silu(y)


def _forward(convolve: Convolution, inputs: Inputs, dy: Tensor) -> Callable[[], object]:
    del dy

    @torch.no_grad()
    def call() -> Tensor:
        return convolve(*inputs)

    return call


def _forward_backward(
    convolve: Convolution, inputs: Inputs, dy: Tensor
) -> Callable[[], object]:
    def call() -> object:
        return torch.autograd.grad(convolve(*inputs), inputs, dy)

    return call


def _check(inputs: Inputs, dy: Tensor) -> Check:
    exact_inputs = tuple(t.detach().double().requires_grad_() for t in inputs)
    y = _conv1d(*exact_inputs)
    exact = [y, *torch.autograd.grad(y, exact_inputs, dy.double())]
    mine = _ours(*inputs)
    ours = [mine, *torch.autograd.grad(mine, inputs, dy)]
    error = max(
        float((a.detach().double() - e.detach()).abs().max() / e.detach().abs().max())
        for a, e in zip(ours, exact, strict=True)
    )
    what = "difference from conv1d in float64, gradients too"
    return Check(what, error, _LIMITS[inputs[0].dtype])
