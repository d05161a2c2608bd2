"""Time candidates in turn, so that a noisy machine is unfair to none of them."""

import statistics
import time
from collections.abc import Callable, Mapping


def interleave(
    candidates: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    slice_seconds: float = 0.05,
    warm_up: int = 1,
) -> dict[str, list[float]]:
    """Run every candidate once in each round and return each one's seconds for a call.

    A candidate shorter than ``slice_seconds`` is called until the slice is full, and the median
    of those calls is its sample of the round. Samples of the same index belong to the same
    round, so their quotients are paired.
    """
    for call in candidates.values():
        for _ in range(warm_up):
            call()
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, call in candidates.items():
            calls: list[float] = []
            while not calls or sum(calls) < slice_seconds:
                start = time.perf_counter()
                call()
                calls.append(time.perf_counter() - start)
            samples[name].append(statistics.median(calls))
    return samples


def paired_ratio(above: list[float], below: list[float]) -> float:
    """Return the median over the rounds of ``above / below``."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))
