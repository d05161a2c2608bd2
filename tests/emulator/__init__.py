"""Run the CUDA kernels' own sources on a processor, to test them where there is no GPU.

``kernel`` stands in for ``mambakit.ops._cuda.kernel``: the host code of an operation calls it
and launches what it gets on CPU tensors. The fixture ``emulated`` (``tests/ops/conftest.py``)
puts it in place. The kernels are compiled by g++ and kept in a folder for temporary files.

Beside wrong numbers it finds, and raises ``KernelError`` for, a barrier or shuffle that some
threads never reach, an unaligned or null address, an index beyond a fixed-size array, and an
``Arguments`` whose size is not its mirror's. Races between lanes and uninitialised shared
memory show as wrong numbers or NaN, since threads take turns in a shifting order and memory is
poisoned. It does not see reads beyond the end of a tensor, and knows nothing of time or
registers.
"""

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import mambakit.ops

FOLDER = Path(__file__).parent
OPS = Path(mambakit.ops.__file__).parent
BUILDS = Path(tempfile.gettempdir()) / f"mambakit-emulator-{os.getuid()}"

# Multiprocessors that the host code is told of when it asks how finely to cut its work.
MULTIPROCESSORS = 4
# Bytes of shared memory that a block and a multiprocessor have, likewise: a large GPU's.
SHARED_MEMORY = (227 * 1024, 228 * 1024)

_KERNEL = re.compile(r'extern "C" void (\w+)\(')
_COMPILER = shutil.which("g++")
_FLAGS = [
    *("-std=c++17", "-O1", "-fPIC", "-w", "-ffp-contract=off"),
    *("-fno-strict-aliasing", "-fsanitize=alignment,null,bounds"),
]


class KernelError(AssertionError):
    """A kernel did what no kernel may do."""


def unavailable() -> str | None:
    """Say why kernels cannot be emulated here, or return ``None`` if they can."""
    return None if _COMPILER else "the CUDA emulator needs g++"


class Kernel:
    """One kernel, built for the processor; launched as ``mambakit.ops._cuda.Kernel`` is."""

    def __init__(self, source: Path, entry: str, defines: tuple[tuple[str, str], ...]) -> None:
        self.entry = entry
        library = _library(source, defines)
        self._run = getattr(library, f"{entry}_run")
        self._run.restype = ctypes.c_char_p
        self._run.argtypes = [ctypes.c_void_p, ctypes.c_uint, ctypes.c_void_p, ctypes.c_size_t]
        size = getattr(library, f"{entry}_arguments_size")
        size.restype = ctypes.c_size_t
        self.arguments_size = size()

    def launch(
        self,
        grid: tuple[int, int, int],
        threads: int,
        arguments: ctypes.Structure,
        shared_bytes: int = 0,
        *,
        overlaps: bool = False,
    ) -> None:
        """Run every block of the grid, one after another; ``overlaps`` changes nothing here.

        Raises:
            KernelError: The launch or the kernel is wrong; the message says how.
        """
        if ctypes.sizeof(arguments) != self.arguments_size:
            raise KernelError(
                f"{self.entry}: the kernel's arguments have {self.arguments_size} bytes, "
                f"their mirror in Python {ctypes.sizeof(arguments)}"
            )
        x, y, z = grid
        if not (1 <= x < 2**31 and 1 <= y <= 65535 and 1 <= z <= 65535):
            raise KernelError(f"{self.entry}: no GPU takes the grid {grid}")
        if threads % 32 or not 32 <= threads <= 1024:
            raise KernelError(
                f"{self.entry}: threads must be whole warps, up to 1024, got {threads}"
            )
        if shared_bytes > SHARED_MEMORY[0]:
            raise KernelError(f"{self.entry}: no GPU has {shared_bytes} bytes of shared memory")
        failure = self._run(
            (ctypes.c_uint * 3)(*grid), threads, ctypes.addressof(arguments), shared_bytes
        ).decode()
        if failure:
            raise KernelError(f"{self.entry}: {failure}")


@cache
def kernel(
    source: Path,
    entry: str,
    defines: tuple[tuple[str, str], ...],
    device_index: int | None = None,
    shared_bytes: int = 0,
) -> Kernel:
    """Build a kernel or find it built; takes what ``mambakit.ops._cuda.kernel`` takes."""
    return Kernel(source, entry, defines)


def run(
    source: Path,
    entry: str,
    defines: tuple[tuple[str, str], ...],
    grid: tuple[int, int, int],
    threads: int,
    arguments: ctypes.Structure,
    shared_bytes: int = 0,
) -> None:
    """Build a kernel and launch it."""
    kernel(source, entry, defines).launch(grid, threads, arguments, shared_bytes)


@cache
def _library(source: Path, defines: tuple[tuple[str, str], ...]) -> ctypes.CDLL:
    return ctypes.CDLL(str(_built(source, defines)))


def _built(source: Path, defines: tuple[tuple[str, str], ...]) -> Path:
    """Return the library of one file's kernels, made anew when any source has changed."""
    given = [
        *(f"-D{name}={value}" for name, value in defines),
        *(f'-DKERNEL_SOURCE="{source}"', f"-I{FOLDER}", f"-I{OPS}"),
    ]
    beside = sorted(source.parent.glob("*.cuh"))
    target = BUILDS / f"{source.stem}-{_digest((given, source, *beside))}.so"
    if not target.exists():
        # which kernels the file has may depend on the defines
        file = str(FOLDER / "entries.cpp")
        text = _compile([*given, "-DKERNEL_ENTRIES=", "-E", "-P", file])
        entries = " ".join(f"ENTRY({name})" for name in _KERNEL.findall(text))
        _compile([*given, f"-DKERNEL_ENTRIES={entries}", file, str(_scheduler())], target)
    return target


@cache
def _scheduler() -> Path:
    """Return the part that all kernels share."""
    source = FOLDER / "scheduler.cpp"
    target = BUILDS / f"scheduler-{_digest(())}.o"
    if not target.exists():
        _compile(["-c", f"-I{FOLDER}", f"-I{OPS}", str(source)], target)
    return target


def _digest(more: tuple[object, ...]) -> str:
    digest = hashlib.sha256(repr((more, _COMPILER, _FLAGS)).encode())
    digest.update(_sources())
    for file in more:
        if isinstance(file, Path):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:32]


@cache
def _sources() -> bytes:
    """Return what every library is made of, beside its own file."""
    return b"".join(
        file.read_bytes() for file in sorted([*FOLDER.glob("*.c*"), *OPS.rglob("*.cuh")])
    )


def _compile(arguments: list[str], target: Path | None = None) -> str:
    if _COMPILER is None:
        raise RuntimeError(unavailable())
    BUILDS.mkdir(exist_ok=True)
    unfinished = None if target is None else target.with_suffix(f".{os.getpid()}")
    to = ["-shared"] * (target is not None and target.suffix == ".so")
    to += [] if unfinished is None else ["-o", str(unfinished)]
    done = subprocess.run(
        [_COMPILER, *_FLAGS, *to, *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise KernelError(f"the emulator cannot compile {arguments}:\n{done.stderr}")
    if target is not None and unfinished is not None:
        unfinished.replace(target)
    return done.stdout
