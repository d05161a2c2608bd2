"""From a process's start to the first result on a GPU: kernels built, then found on disk."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .rows import Row

_SCRIPT = """
import time, torch
from mambakit.modules import Mamba
mixer, x = Mamba(1024, device="cuda"), torch.randn(2, 512, 1024, device="cuda")
torch.cuda.synchronize()
began = time.perf_counter()
with torch.autocast("cuda", torch.bfloat16):
    y = mixer(x)[0]
y.float().sum().backward()
with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
    mixer(x[:, :1], mixer(x)[1])
torch.cuda.synchronize()
print(time.perf_counter() - began)
"""


def run(rounds: int, cases: str = "") -> Iterator[Row]:
    """Yield the time of a mixer's first calls, without and with a cache of kernels."""
    built, found = [], []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as cache:
            for times in (built, found):
                times.append(_first(cache))
    for case, samples in (("no kernel built before", built), ("kernels on disk", found)):
        if cases in case:
            yield Row("gpu first call", case, "mambakit", "s", samples)


def _first(cache: str) -> float:
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT],
        cwd=Path(__file__).parent.parent,
        env=os.environ | {"XDG_CACHE_HOME": cache},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return float(done.stdout.splitlines()[-1])
