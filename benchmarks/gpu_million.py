"""One sequence of a million steps: the scan in one call, and a training step of the 130M model.

Time must be linear in the length: each length is compared with one of a quarter.
"""

import gc
from collections.abc import Iterator

import torch

from . import gpu
from .gpu_scan import _check, _forward_backward, _ours, inputs
from .gpu_training_step import Case, _draw, _Ours, _seconds
from .rows import Check, Row

LENGTHS = (2**18, 2**20)
CHANNELS = 1536
# The model's activations at a million tokens are 350 GB; a chunk of them is bounded.
CHUNK = 2**16
_MOST = 1.1


def run(rounds: int, cases: str = "") -> Iterator[Row]:
    """Yield the scan's rows, then the model's."""
    for what, measure in (("scan", _scan), ("130M training step", _step)):
        if cases in f"{what}, forward + backward, b 1, d {CHANNELS}":
            yield from measure(rounds, what)


def _scan(rounds: int, what: str) -> Iterator[Row]:
    samples = {}
    for l in LENGTHS:
        one = inputs(1, CHANNELS, l, 16, torch.bfloat16)
        checked = _check(one)
        call = _forward_backward(lambda i: _ours(i, backend="fused"), one)
        call()
        samples[l] = [gpu.seconds(call) for _ in range(rounds)]
        yield Row(
            "gpu million",
            f"{what}, forward + backward, b 1, d {CHANNELS}, l {l:,}",
            "mambakit",
            "ms",
            [1e3 * s for s in samples[l]],
            check=checked,
            note=f"peak {gpu.peak_bytes(call) / 1e9:.1f} GB above the inputs",
        )
        del one, call
        torch.cuda.empty_cache()
    _require_linear(samples)


def _step(rounds: int, what: str) -> Iterator[Row]:
    samples = {}
    for l in LENGTHS:
        case = Case("130M", 768, 24, 0, 0, 1, l)
        step = _Ours(case, _draw(case), chunk=CHUNK)
        checked = step.check()
        step()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        samples[l] = [_seconds(step) for _ in range(rounds)]
        peak = torch.cuda.max_memory_allocated() / 1e9
        yield Row(
            "gpu million",
            f"{what}, 1 x {l:,} tokens in chunks of {CHUNK:,}",
            "mambakit",
            "s",
            samples[l],
            tokens=l,
            check=checked,
            note=f"peak {peak:.1f} GB",
        )
        del step
        gc.collect()  # modules and what compiled them hold each other
        torch.cuda.empty_cache()
    _require_linear(samples)


def _require_linear(samples: dict[int, list[float]]) -> None:
    short, long = (min(times) for times in samples.values())
    first, last = samples
    Check("growth of the time over growth of the length", long / short * first / last, _MOST)
