"""The selective scan on a GPU beside its floor, and beside mamba_ssm where it is installed."""

import importlib.util
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from mambakit.ops import selective_scan
from mambakit.ops._backends import Backend

from . import gpu
from .rows import Check, Row

BF16, FP32 = torch.bfloat16, torch.float32
# b, d, l, n and dtype: layers of the published models, long ones, ragged ones, other states.
CASES = [
    ((8, 2048, 2048, 16), BF16),
    ((64, 2048, 512, 16), BF16),
    ((8, 5120, 2048, 16), BF16),
    ((1, 2048, 65536, 16), BF16),
    ((1, 5120, 8192, 16), BF16),
    ((2, 5120, 2048, 16), BF16),
    ((1, 2048, 2048, 16), BF16),
    ((8, 2048, 2056, 16), BF16),
    ((8, 2048, 2047, 16), BF16),
    ((8, 2048, 2048, 64), BF16),
    ((8, 2048, 2048, 1), BF16),
    ((8, 2048, 2048, 16), FP32),
]
NAMES = {FP32: "fp32", BF16: "bf16"}
# Elements of (b, l, d, n) that float64 and PyTorch's own operations are given to check with.
_CHECKED_ELEMENTS = 2**26
# Relative errors, in the root mean square: one rounding to bf16 is 1.7e-3, and gradients in
# float32 are sums over the length and the batch.
_LIMITS = {FP32: 1e-5, BF16: 2.5e-3}

Inputs = dict[str, Tensor]
Scan = Callable[[Inputs], tuple[Tensor, Tensor]]


def run(rounds: int, cases: str = "") -> Iterator[Row]:
    """Yield the rows: each case forward, then with all gradients, then its peak memory."""
    for shape, dtype in CASES:
        case = f"(b, d, l, n) = {shape}, {NAMES[dtype]}"
        if cases not in case:
            continue
        one = inputs(*shape, dtype)
        check = _check(one)
        copies = gpu.sets(list(one.values())) - 1
        several = [one, *({k: _like(t) for k, t in one.items()} for _ in range(copies))]
        scans: dict[str, Scan] = {"fused": partial(_ours, backend="fused")}
        if importlib.util.find_spec("mamba_ssm") is not None:
            scans["mamba_ssm"] = _mamba_ssm
        for name, wrap, floor in (
            ("forward", _forward, _forward_floor),
            ("forward + backward", _forward_backward, _forward_backward_floor),
        ):
            calls = {
                subject: [wrap(scan, i) for i in several] for subject, scan in scans.items()
            }
            times = gpu.interleave_replays(calls, rounds=rounds)
            seconds, bound = floor(one)
            times["floor"] = [seconds] * rounds
            for subject, samples in times.items():
                yield Row(
                    "gpu scan",
                    f"{name}, {case}",
                    subject,
                    "ms",
                    [1e3 * s for s in samples],
                    check=check if subject == "fused" else None,
                    note=f"bound by {bound}" if subject == "floor" else "",
                )
        for subject, scan in scans.items():
            peak = gpu.peak_bytes(_forward_backward(scan, one))
            yield Row("gpu scan", f"peak memory, {case}", subject, "MB", [peak / 2**20])
        del one, several
        torch.cuda.empty_cache()


def inputs(b: int, d: int, l: int, n: int, dtype: torch.dtype) -> Inputs:
    """Draw what a Mamba block hands to its scan, in the memory layout in which it does."""
    generator = torch.Generator(gpu.DEVICE).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=gpu.DEVICE)

    rank = max(16, d // 32)
    projected = (0.3 * normal(b, l, rank + 2 * n)).to(dtype)
    step = torch.exp(-6.9 + 4.6 * torch.rand(d, generator=generator, device=gpu.DEVICE))
    return {
        "x": normal(b, l, d).to(dtype),
        "dt": (0.5 * normal(b, l, d)).to(dtype),
        "A": -torch.arange(1.0, n + 1, device=gpu.DEVICE).repeat(d, 1),
        "B": projected[..., rank : rank + n],
        "C": projected[..., rank + n :],
        "D": torch.ones(d, device=gpu.DEVICE),
        "gate": normal(b, l, 2 * d).to(dtype)[..., d:],
        "dt_bias": torch.log(torch.expm1(step)),
        "state": 0.1 * normal(b, d, n),
        "dy": normal(b, l, d).to(dtype),
        "dstate": 0.1 * normal(b, d, n),
    }


def _like(t: Tensor) -> Tensor:
    """Copy a tensor with its strides, which a slice of a wider one has to keep."""
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device).copy_(t)


def _ours(i: Inputs, backend: Backend) -> tuple[Tensor, Tensor]:
    arguments = {name: t for name, t in i.items() if name not in {"dy", "dstate"}}
    return selective_scan(**arguments, dt_softplus=True, backend=backend)


def _mamba_ssm(i: Inputs) -> tuple[Tensor, Tensor]:
    """Scan in the peer's own layout, channels before time; it takes no state in."""
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    y, last = selective_scan_fn(
        i["x"].mT, i["dt"].mT, i["A"], i["B"].mT, i["C"].mT, i["D"], z=i["gate"].mT,
        delta_bias=i["dt_bias"], delta_softplus=True, return_last_state=True,
    )  # fmt: skip
    return y.mT, last


def _of_peer(scan: Scan, i: Inputs) -> Inputs:
    """Lay the inputs out as the scan that is timed wants them."""
    if scan is not _mamba_ssm:
        return i
    laid = {k: t.mT.contiguous().mT if t.ndim == 3 else t for k, t in i.items()}
    return laid | {"dstate": i["dstate"], "state": i["state"]}


def _forward(scan: Scan, i: Inputs) -> gpu.Call:
    i = _of_peer(scan, i)

    @torch.no_grad()
    def call() -> object:
        return scan(i)

    return call


def _forward_backward(scan: Scan, i: Inputs) -> gpu.Call:
    i = _of_peer(scan, i)
    fresh, wanted = _leaves(i)
    if scan is _mamba_ssm:
        wanted = [t for t in wanted if t is not fresh["state"]]

    def call() -> object:
        y, last = scan(fresh)
        outputs, gradients = [y, last], [i["dy"], i["dstate"]]
        if not last.requires_grad:  # the peer's state carries no gradient
            del outputs[1], gradients[1]
        return torch.autograd.grad(outputs, wanted, gradients)

    return call


def _leaves(i: Inputs) -> tuple[Inputs, list[Tensor]]:
    fresh = {k: t.detach().requires_grad_(k not in {"dy", "dstate"}) for k, t in i.items()}
    return fresh, [t for t in fresh.values() if t.requires_grad]


def _forward_floor(i: Inputs) -> tuple[float, str]:
    return _floor(i, ("x", "dt", "gate", "B", "C", "dy"), 1)


def _forward_backward_floor(i: Inputs) -> tuple[float, str]:
    """Add the backward: it reads all of them and dy, and writes as many gradients."""
    once = ("x", "dt", "gate", "B", "C")
    return _floor(i, ("dy", *once, *once, "dy", *once), 2)


def _floor(i: Inputs, moved: tuple[str, ...], passes: int) -> tuple[float, str]:
    """Return the larger of two times: to move the tensors once, to take the exponentials."""
    memory = sum(i[name].nbytes for name in moved) / gpu.bytes_a_second()
    b, l, d = i["x"].shape
    exponentials = passes * b * l * d * i["A"].shape[1] / gpu.exponentials_a_second()
    return max((memory, "memory"), (exponentials, "exponentials"))


def _check(i: Inputs) -> Check:
    """Compare output, state and gradients with float64 on two slices.

    The first is of channels, the whole length and batch. The gradients of B and C are sums over
    all channels: they are compared over the first sequence, if it is short enough.
    """
    b, l, d = i["x"].shape
    n = i["A"].shape[1]
    channels = max(1, min(d, _CHECKED_ELEMENTS // (b * l * n)))
    whole = _answers(partial(_ours, backend="fused"), i)
    worst = _worst(
        {k: _channels(k, t, channels) for k, t in whole.items() if k not in {"dB", "dC"}},
        {k: _channels(k, t, channels) for k, t in i.items()},
    )
    what = f"error against float64 over what its dtype allows, {channels} channels"
    if l * d * n <= _CHECKED_ELEMENTS:
        rows = {k: t[:1] if t.ndim == 3 else t for k, t in i.items()}
        summed = {k: whole[k][:1] for k in ("y", "dB", "dC")}
        worst = max(worst, _worst(summed, rows))
        what += ", dB and dC of one sequence"
    return Check(what, worst, 1.0)


def _worst(mine: Inputs, i: Inputs) -> float:
    exact = _answers(partial(_ours, backend="parallel"), {k: t.double() for k, t in i.items()})
    return max(
        float((t.double() - exact[name]).norm() / exact[name].norm()) / _LIMITS[t.dtype]
        for name, t in mine.items()
    )


def _answers(scan: Scan, i: Inputs) -> Inputs:
    fresh, wanted = _leaves(i)
    outputs = scan(fresh)
    gradients = torch.autograd.grad(outputs, wanted, (i["dy"], i["dstate"]))
    named = {f"d{k}": g for k, g in zip(_names(fresh), gradients, strict=True)}
    return {"y": outputs[0].detach(), "state": outputs[1].detach(), **named}


def _names(fresh: Inputs) -> list[str]:
    return [name for name, t in fresh.items() if t.requires_grad]


def _channels(name: str, t: Tensor, channels: int) -> Tensor:
    if name in {"B", "C"}:
        return t
    if name.removeprefix("d") in {"A", "D", "t_bias", "dt_bias"}:
        return t[:channels]
    if name.removeprefix("d") == "state":
        return t[:, :channels]
    return t[..., :channels]
