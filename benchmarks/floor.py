"""Measure the machine's rate of fused multiply-adds, and the floor it sets for the scan."""

import ctypes
import os
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

_SOURCE = Path(__file__).with_name("fma_peak.c")
_LANES = {"AVX512": 16, "AVX2": 8}
_CHAINS = 12
_STEPS = 1_000_000

# Multiply-add slots for each vector of (b, d, l, n), in the cheapest form we know. Forward: one
# product for dt A, a fifth-degree polynomial for its exponential, one product for dt x B, one
# multiply-add for the state and one for the output. Backward: those again, to rebuild the
# states from a checkpoint, and eight more for the adjoint and the gradients.
FORWARD_SLOTS = 9
FORWARD_BACKWARD_SLOTS = 26


class FmaPeak:
    """Call it to run a fixed number of multiply-adds on every thread of torch.

    Timed in turn with a kernel, it gives the floor under the conditions of that very moment,
    which a shared machine changes from one second to the next.
    """

    def __init__(self) -> None:
        self.threads = torch.get_num_threads()
        self._lanes = _vector_lanes()
        self._run = build(_SOURCE).fma_chains
        self._run.argtypes = [ctypes.c_int64]
        self._run.restype = ctypes.c_float
        self._pool = ThreadPoolExecutor(self.threads)

    def __call__(self) -> None:
        for result in [self._pool.submit(self._run, _STEPS) for _ in range(self.threads)]:
            result.result()

    def gflops(self, seconds: float) -> float:
        """Return the rate that a call of this duration stands for."""
        return 2e-9 * self._lanes * _CHAINS * _STEPS * self.threads / seconds

    def floor(self, seconds: float, elements: int, slots: int) -> float:
        """Return the seconds in which ``slots`` multiply-adds of each element could be done."""
        rate = self._lanes * _CHAINS * _STEPS * self.threads / seconds
        return elements * slots / rate


def _vector_lanes() -> int:
    return _LANES.get(torch.backends.cpu.get_cpu_capability(), 4)


def build(source: Path) -> ctypes.CDLL:
    """Compile a C file for this processor; it is told LANES, the floats of a vector."""
    asked = [os.environ["CC"]] if "CC" in os.environ else ["cc", "gcc", "clang"]
    compiler = next(filter(None, map(shutil.which, asked)), None)
    if compiler is None:
        raise RuntimeError(
            f"benchmarks: a C compiler must be there to measure the floor, got none of {asked}"
        )
    flags = ["-O3", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC"]
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / f"{source.stem}.so"
        subprocess.run(
            [compiler, *flags, f"-DLANES={_vector_lanes()}", str(source), "-o", str(library)],
            check=True,
        )
        return ctypes.CDLL(str(library))
