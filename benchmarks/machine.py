"""Say what a row was measured on."""

import datetime
import platform
import re
import subprocess
import time
from importlib import metadata
from pathlib import Path

import torch

from mambakit.modules._hardware import in_hardware
from mambakit.ops import _native

_PACKAGES = ("torch", "mambakit", "transformers", "mambapy")
_GPU_PACKAGES = ("torch", "triton", "cuda-bindings", "mambakit", "transformers", "mamba_ssm")
_ROOT = Path(__file__).parent.parent


def describe() -> dict[str, object]:
    """Return device, threads, instruction sets, versions, commit and date."""
    return {
        "device": cpu_name(),
        "threads": torch.get_num_threads(),
        "isa": {
            "torch": torch.backends.cpu.get_cpu_capability(),
            "mambakit": _native.isa(),
            "bf16_instructions": in_hardware(torch.bfloat16, torch.device("cpu")),
        },
        "python": platform.python_version(),
        **{name: _version(name) for name in _PACKAGES},
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def describe_gpu() -> dict[str, object]:
    """Return the GPU that torch computes on, versions, commit and date."""
    properties = torch.cuda.get_device_properties()
    return {
        "device": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "memory_gb": round(properties.total_memory / 1e9, 1),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        **{name: _version(name) for name in _GPU_PACKAGES},
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def gpu_slug() -> str:
    """Return a folder name for the GPU."""
    return _slug(torch.cuda.get_device_name())


def slug() -> str:
    """Return a folder name for this device."""
    # Virtual machines of one processor differ in what they are let see of it.
    bf16 = "with bf16" if in_hardware(torch.bfloat16, torch.device("cpu")) else ""
    return _slug(f"{cpu_name()} {torch.get_num_threads()} threads {bf16}")


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def busy() -> float:
    """Return the share of the cores' time that other processes take, or 0 where unknown.

    Timings beside other work say little: a single busy core halves a kernel on two.
    """
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0

    def times() -> list[int]:
        return [int(word) for word in stat.read_text().splitlines()[0].split()[1:9]]

    before = times()
    time.sleep(1)
    spent = [after - then for after, then in zip(times(), before, strict=True)]
    idle = spent[3] + spent[4]  # waiting for a disk is idle too
    return 1 - idle / max(1, sum(spent))


def cpu_name() -> str:
    """Return the processor's model, with its family where the model name says little."""
    if Path("/proc/cpuinfo").exists():
        fields = dict(
            re.findall(r"^(\w[\w ]*?)\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.M)
        )
        if "model name" in fields:
            number = f"family {fields.get('cpu family')} model {fields.get('model')}"
            return re.sub(r"\((R|TM)\)", "", fields["model name"]) + f" ({number})"
    return platform.processor() or platform.machine()


def commit() -> str:
    """Return the commit that was measured, marked where the tree differed from it."""
    head = _git("rev-parse", "--short=12", "HEAD")
    if head is None:
        return "unknown"
    changed = _git("status", "--porcelain", "--", "src", "benchmarks/*.py", "setup.py")
    return f"{head} with changes" if changed else head


def _git(*arguments: str) -> str | None:
    done = subprocess.run(
        ["git", *arguments], cwd=_ROOT, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
