"""The selective scan beside its compute floor and mamba.py's parallel scan."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from mambapy.pscan import pscan  # type: ignore[import-untyped]
from torch import Tensor

from mambakit.ops import selective_scan
from mambakit.ops._backends import Backend

from .floor import FORWARD_BACKWARD_SLOTS, FORWARD_SLOTS, FmaPeak
from .rows import Check, Row
from .timing import interleave

# The first is a layer of the 130M model. pscan holds a dozen (b, l, d, n) tensors, which is too
# much memory at the longest shape and too much time to repeat everywhere in bf16.
CASES = [
    ((1, 1536, 2048, 16), torch.float32, True),
    ((8, 384, 1024, 16), torch.float32, True),
    ((4, 128, 4096, 16), torch.float32, True),
    ((1, 1536, 16384, 16), torch.float32, False),
    ((1, 1536, 2048, 16), torch.bfloat16, True),
    ((1, 1536, 16384, 16), torch.bfloat16, False),
]
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
_BACKENDS: tuple[Backend, ...] = ("fused", "parallel")
_CHECKED_ELEMENTS = 2**25
# The largest of two roundings to bf16 that disagree, with room for one sum of such terms.
_BF16_LIMIT = 4e-3

Inputs = dict[str, Tensor]
Scan = Callable[[Inputs], Tensor]


def run(rounds: int) -> Iterator[Row]:
    """Yield the rows: each case forward, then forward and backward."""
    peak = FmaPeak()
    for shape, dtype, with_pscan in CASES:
        inputs = _inputs(*shape, dtype)
        checks = _check(inputs)
        scans: dict[str, Scan] = {name: partial(_ours, backend=name) for name in _BACKENDS}
        if with_pscan:
            scans["mambapy pscan"] = _pscan
        for name, wrap, slots in (
            ("forward", _forward, FORWARD_SLOTS),
            ("forward + backward", _forward_backward, FORWARD_BACKWARD_SLOTS),
        ):
            calls: dict[str, Callable[[], object]] = {"fma peak": peak}
            calls |= {subject: wrap(scan, inputs) for subject, scan in scans.items()}
            times = interleave(calls, rounds=rounds)
            b, d, l, n = shape
            peaks = times.pop("fma peak")
            times["compute floor"] = [peak.floor(s, b * d * l * n, slots) for s in peaks]
            case = f"{name}, (b, d, l, n) = {shape}, {NAMES[dtype]}"
            for subject, samples in times.items():
                note = ""
                if subject == "compute floor":
                    rate = sorted(peak.gflops(s) for s in peaks)[len(peaks) // 2]
                    note = f"{slots} multiply-adds an element at {rate:.0f} GFLOP/s"
                yield Row(
                    "scan",
                    case,
                    subject,
                    "ms",
                    [1e3 * s for s in samples],
                    check=checks.get(subject),
                    note=note,
                )


def _inputs(b: int, d: int, l: int, n: int, dtype: torch.dtype) -> Inputs:
    """Draw what a Mamba block hands to its scan, in the memory layout in which it does."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    rank = max(1, d // 32)
    projected = (0.3 * normal(b, l, rank + 2 * n)).to(dtype)
    in_proj = normal(b, l, 2 * d).to(dtype)
    step = torch.exp(torch.empty(d).uniform_(-6.9, -2.3, generator=generator))
    tensors = {
        "x": normal(b, l, d).to(dtype),
        "dt": (0.5 * normal(b, l, d)).to(dtype),
        "A": -torch.arange(1.0, n + 1).repeat(d, 1),
        "B": projected[..., rank : rank + n],
        "C": projected[..., rank + n :],
        "D": torch.ones(d),
        "gate": in_proj[..., d:],
        "dt_bias": torch.log(torch.expm1(step)),
        "dy": normal(b, l, d).to(dtype),
    }
    return {k: t.requires_grad_(k != "dy") for k, t in tensors.items()}


def _ours(inputs: Inputs, backend: Backend) -> Tensor:
    arguments = {name: t for name, t in inputs.items() if name != "dy"}
    return selective_scan(**arguments, dt_softplus=True, backend=backend).y


def _pscan(i: Inputs) -> Tensor:
    """Scan as mamba.py's own block does, with the arithmetic around it that ours includes."""
    dt = F.softplus(i["dt"] + i["dt_bias"].to(i["dt"].dtype))
    decay = torch.exp(dt.unsqueeze(-1) * i["A"].to(dt.dtype))
    drive = dt.unsqueeze(-1) * i["B"].unsqueeze(2) * i["x"].unsqueeze(-1)
    states = pscan(decay, drive)
    y = (states @ i["C"].unsqueeze(-1)).squeeze(3) + i["D"].to(dt.dtype) * i["x"]
    return y * F.silu(i["gate"])


def _forward(scan: Scan, inputs: Inputs) -> Callable[[], object]:
    @torch.no_grad()
    def call() -> Tensor:
        return scan(inputs)

    return call


def _forward_backward(scan: Scan, inputs: Inputs) -> Callable[[], object]:
    wanted = [t for t in inputs.values() if t.requires_grad]

    def call() -> object:
        return torch.autograd.grad(scan(inputs), wanted, inputs["dy"])

    return call


def _check(inputs: Inputs) -> dict[str, Check]:
    """Compare output and gradients with float64, over as many channels as memory allows."""
    b, l, d = inputs["x"].shape
    channels = max(1, min(d, _CHECKED_ELEMENTS // (b * l * inputs["A"].shape[1])))
    part = {name: _channels(name, t.detach(), channels) for name, t in inputs.items()}
    exact = _answers(_pscan, {name: t.double() for name, t in part.items()})

    def error(scan: Scan) -> float:
        return max(
            float((mine - truth).abs().max() / truth.abs().max())
            for mine, truth in zip(_answers(scan, part), exact, strict=True)
        )

    if inputs["x"].dtype == torch.float32:
        limit = 2 * error(_pscan) + torch.finfo(torch.float32).eps
    else:
        limit = _BF16_LIMIT
    what = f"difference from mambapy's pscan in float64, gradients too ({channels} channels)"
    return {
        backend: Check(what, error(partial(_ours, backend=backend)), limit)
        for backend in _BACKENDS
    }


def _channels(name: str, t: Tensor, channels: int) -> Tensor:
    if name in {"B", "C"}:
        return t
    if name in {"A", "D", "dt_bias"}:
        return t[:channels]
    return t[..., :channels]


def _answers(scan: Scan, inputs: Inputs) -> list[Tensor]:
    fresh = {k: t.detach().requires_grad_(k != "dy") for k, t in inputs.items()}
    y = scan(fresh)
    wanted = [t for t in fresh.values() if t.requires_grad]
    return [t.detach().double() for t in (y, *torch.autograd.grad(y, wanted, fresh["dy"]))]
