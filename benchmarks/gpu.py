"""Time calls on a GPU by replays of CUDA graphs, and say what the GPU can do."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import cache

import torch
from torch import Tensor

Call = Callable[[], object]

DEVICE = "cuda"

# Inputs of a kernel are repeated until they are this much, several times a GPU's L2 cache.
_PAST_THE_CACHE = 256 << 20
_MOST_SETS = 16
_COPIED = 1 << 30


class Replay:
    """Calls captured as one CUDA graph: what the GPU does, without the host's part.

    ``calls`` do the same on different inputs, so that none finds its own in the cache.
    """

    def __init__(self, calls: Sequence[Call]) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for call in calls:
                for _ in range(2):
                    call()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        self._graph, self._calls = torch.cuda.CUDAGraph(), len(calls)
        with torch.cuda.graph(self._graph):
            for call in calls:
                call()

    def seconds(self, repeats: int = 1) -> float:
        """Return the time of one call, over ``repeats`` replays."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(repeats):
            self._graph.replay()
        end.record()
        end.synchronize()
        return 1e-3 * begin.elapsed_time(end) / (repeats * self._calls)


def interleave_replays(
    candidates: Mapping[str, Sequence[Call]], *, rounds: int, slice_seconds: float = 0.02
) -> dict[str, list[float]]:
    """Time every candidate once in each round, as ``interleave`` does, by replays."""
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    replays = {name: Replay(calls) for name, calls in candidates.items()}
    repeats = {}
    for name, replay in replays.items():
        replay.seconds()
        whole = replay.seconds() * len(candidates[name])
        repeats[name] = max(1, round(slice_seconds / whole))
    for _ in range(rounds):
        for name, replay in replays.items():
            samples[name].append(replay.seconds(repeats[name]))
    return samples


def seconds(call: Call) -> float:
    """Return the time of one call that is not captured, from its first kernel to its last."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return 1e-3 * begin.elapsed_time(end)


def sets(tensors: Sequence[Tensor]) -> int:
    """Return how many sets of such inputs are past the cache together."""
    size = sum(t.nbytes for t in tensors)
    return min(_MOST_SETS, max(1, math.ceil(_PAST_THE_CACHE / size)))


def peak_bytes(call: Call) -> int:
    """Return by how much a call raises the memory in use at its highest."""
    call()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@cache
def bytes_a_second() -> float:
    """Return the rate of a large copy on the device, bytes read and written together.

    A kernel copies: a graph's own copies are slower than kernels read and write.
    """
    source = torch.empty(_COPIED // 4, dtype=torch.int32, device=DEVICE).random_()
    target = torch.empty_like(source)
    replay = Replay([lambda: torch.neg(source, out=target)])
    return 2 * _COPIED / statistics.median(replay.seconds(5) for _ in range(5))


@cache
def exponentials_a_second() -> float:
    """Return the rate of the special function units: 16 a clock on each multiprocessor."""
    from cuda.bindings import driver

    attribute = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_CLOCK_RATE
    status, kilohertz = driver.cuDeviceGetAttribute(attribute, torch.cuda.current_device())
    if status:
        raise RuntimeError(f"benchmarks: the driver must tell the clock's rate, got {status}")
    processors = torch.cuda.get_device_properties().multi_processor_count
    return 16e3 * kilohertz * processors
