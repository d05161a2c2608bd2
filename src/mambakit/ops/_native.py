"""Find and load the compiled CPU kernels, or say why this machine has none.

The build makes one shared library for each instruction set (see ``setup.py``). The best that
the processor can run is loaded once, on the first call, and stays for the life of the process.
"""

import ctypes
import os
import platform
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

ABI_VERSION = 3

# The codes of enum Dtype, by which the kernels are told how a tensor is stored.
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}

_FOLDER = Path(__file__).parent
_MISSING = _FOLDER / "_cpu_missing.txt"

# What mk_supported_level() counts up to on x86-64, the oldest first.
_LEVELS = ("baseline", "avx2", "avx512")


class _Found(NamedTuple):
    library: ctypes.CDLL | None
    isa: str
    why_not: str | None


def library() -> ctypes.CDLL:
    """Return the CPU library for this processor.

    Raises:
        RuntimeError: There is none; the message says why.
    """
    found = _find()
    if found.library is None:
        raise RuntimeError(found.why_not)
    return found.library


def unavailable() -> str | None:
    """Say in one clause why there is no CPU library, or return ``None`` if there is one."""
    return _find().why_not


def isa() -> str:
    """Name the instruction set of ``library()``: "avx512", "avx2", "baseline" or "neon".

    Raises:
        RuntimeError: There is no CPU library; the message says why.
    """
    library()
    return _find().isa


def not_built() -> str | None:
    """Return the build's note on what it could not make, or ``None`` if it made everything."""
    return _MISSING.read_text(encoding="utf-8").strip() if _MISSING.exists() else None


def runnable() -> tuple[str, ...]:
    """Name the builds that are there and that this processor can run, the oldest first."""
    if platform.machine().lower() in {"arm64", "aarch64"}:
        names: tuple[str, ...] = ("neon",)
    elif _path("baseline").exists():
        names = _LEVELS[: open_library("baseline").mk_supported_level()]
    else:
        names = ()
    return tuple(name for name in names if _path(name).exists())


@cache
def open_library(name: str) -> ctypes.CDLL:
    """Load the library of one instruction set, whether or not it is the best one.

    Raises:
        RuntimeError: It was not built, cannot be loaded, or is of another version.
    """
    path = _path(name)
    try:
        opened = ctypes.CDLL(str(path))
    except OSError as error:
        raise RuntimeError(f"the CPU library {path.name} cannot be loaded: {error}") from error
    version = opened.mk_abi_version()
    if version != ABI_VERSION:
        raise RuntimeError(
            f"the CPU library {path.name} is of version {version}, this package needs "
            f"{ABI_VERSION}: reinstall mambakit"
        )
    opened.mk_use_openmp.argtypes = [ctypes.c_void_p]
    opened.mk_use_openmp.restype = None
    opened.mk_use_openmp(_openmp_fork())
    if hasattr(os, "register_at_fork"):
        # A forked child has none of its parent's OpenMP threads, and the runtime would wait for
        # them for ever. In the child the kernels start threads of their own for each call.
        os.register_at_fork(after_in_child=lambda: opened.mk_use_openmp(None))
    return opened


@cache
def _find() -> _Found:
    try:
        names = runnable()
        if not names:
            return _Found(None, "", _why_none())
        return _Found(open_library(names[-1]), names[-1], None)
    except RuntimeError as error:
        return _Found(None, "", str(error))


def _path(name: str) -> Path:
    return _FOLDER / f"_cpu_{name}.so"


def _why_none() -> str:
    note = not_built()
    if note is not None:
        return f"the CPU library was not built: {note}"
    builds = sorted(path.name for path in _FOLDER.glob("_cpu_*.so"))
    if not builds:
        return (
            "the CPU library was not built: mambakit runs from a source tree that was never "
            "installed; pip install -e ."
        )
    return (
        f"the CPU library cannot be used: of its builds only {', '.join(builds)} are here, and "
        f"a processor of type {platform.machine()} starts from another; reinstall mambakit"
    )


def _openmp_fork() -> int | None:
    """Return the address of GNU OpenMP's fork in the runtime that torch has loaded, if any.

    Importing torch puts its runtime's symbols into the process, so they are found without
    opening a second runtime beside it.
    """
    if sys.platform == "win32":
        return None
    try:
        function = ctypes.CDLL(None).GOMP_parallel
    except AttributeError:
        return None
    return ctypes.cast(function, ctypes.c_void_p).value
