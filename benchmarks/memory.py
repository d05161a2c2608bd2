"""Peak memory of a training step of the 130M model against the length: it must be linear.

Each length is measured in a process of its own, as the rise of the resident set's peak above
what the process holds before the step: the model and the optimizer's state. The parameters'
gradients, 0.5 GB whatever the length, belong to the rise.
"""

import ctypes
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mambakit import MambaConfig, MambaLM

from .peers import VOCABULARY
from .rows import Check, Row
from .training_step import Step

LENGTHS = (1024, 2048, 4096)
_MOST = 1.05


def run(rounds: int) -> Iterator[Row]:
    """Yield the peak at each length."""
    del rounds
    measured: dict[int, dict[str, Any]] = {}
    for length in LENGTHS:
        done = subprocess.run(
            [sys.executable, "-m", f"{__package__}.memory", str(length)],
            cwd=Path(__file__).parent.parent,
            env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        measured[length] = json.loads(done.stdout.splitlines()[-1])
    first, last = LENGTHS[0], LENGTHS[-1]
    growth = measured[last]["peak_gb"] / measured[first]["peak_gb"]
    check = Check("growth of the peak over growth of the length", growth * first / last, _MOST)
    for length, values in measured.items():
        yield Row(
            "memory",
            f"130M training step, batch 1, {length} tokens, fp32",
            "mambakit",
            "GB",
            [values["peak_gb"]],
            check=check,
            note=f"largest tensor but the logits: {tuple(values['largest'])}",
        )


def _measure(length: int) -> dict[str, Any]:
    torch.manual_seed(0)
    config = MambaConfig(d_model=768, n_layer=24, vocab_size=VOCABULARY)
    tokens, targets = torch.randint(VOCABULARY, (2, 1, length))
    step = Step(MambaLM(config), tokens, targets, "fp32")
    step(64)
    # Linux with glibc: give back what the short step freed, forget the peak so far.
    ctypes.CDLL(None).malloc_trim(0)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    with _LargestTensor() as largest:
        step(length)
    peak = resident("VmHWM") - before
    shape = largest.shape
    if shape.numel() >= length * config.d_inner * config.d_state:
        raise RuntimeError(
            "memory: no tensor but the logits may have as many entries as (b, l, d, n), "
            f"got one of shape {tuple(shape)}"
        )
    return {"peak_gb": peak / 1e6, "largest": list(shape)}


class _LargestTensor(TorchDispatchMode):
    """Remember the largest shape that any operation returns, parameters and logits apart."""

    def __init__(self) -> None:
        super().__init__()
        self.shape = torch.Size([0])

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if (
                isinstance(leaf, Tensor)
                and VOCABULARY not in leaf.shape
                and leaf.numel() > self.shape.numel()
            ):
                self.shape = leaf.shape
        return out


def resident(field: str) -> int:
    """Return a field of this process's status in kilobytes, on Linux."""
    text = Path("/proc/self/status").read_text()
    found = re.search(rf"^{field}:\s*(\d+) kB", text, re.M)
    if found is None:
        raise RuntimeError(f"memory: /proc/self/status must have {field}, got none")
    return int(found[1])


if __name__ == "__main__":
    print(json.dumps(_measure(int(sys.argv[1]))))
