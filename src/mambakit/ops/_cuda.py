"""Compile CUDA kernels at run time, keep them on disk, and launch them on torch's stream.

A kernel is a ``.cu`` file beside the Python that calls it. NVRTC, NVIDIA's compiler as a
library (the extra ``cuda`` brings it), turns it into machine code for one GPU and one set of -D
defines; no toolkit is needed. The code is kept in the user's cache folder,
``$XDG_CACHE_HOME/mambakit`` or ``~/.cache/mambakit``, under a name made of all that it was made
from. That folder is a convenience: where it cannot be written, or a file in it is damaged, the
kernel is compiled.

A kernel takes one parameter, a struct by value that a ``ctypes.Structure`` mirrors field by
field (``_cuda.cuh`` says what kernels are written in):

    KERNEL(128, 2) twice(const __grid_constant__ Arguments a) { ... }

    kernel(path, "twice", (("T", "bf16"),), index).launch((blocks, 1, 1), 128, arguments)
"""

import ctypes
import hashlib
import os
import re
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

Defines = tuple[tuple[str, str], ...]

OPS = Path(__file__).parent

# From this compute capability on GPUs copy asynchronously to shared memory and know bfloat16.
OLDEST = (8, 0)
# So much shared memory a kernel has without asking.
_SHARED_BYTES = 48 * 1024

_INSTALL = "pip install 'mambakit[cuda]'"
_OPTIONS = ("--std=c++17", "--ptxas-options=-v")
_INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.MULTILINE)
_MAGIC = b"mambakit kernel 1\n"
_DIGEST_BYTES = hashlib.sha256().digest_size


class Compiled(NamedTuple):
    """Machine code for one GPU architecture, and what the compiler said about it."""

    cubin: bytes
    log: str


class Kernel:
    """One kernel, loaded on one GPU for the life of the process."""

    def __init__(self, name: str, device_index: int, function: Any, context: Any) -> None:
        from cuda.bindings import driver

        self.name = name
        self._device = device_index
        self._function = function
        self._context = context
        self._launch = driver.cuLaunchKernel

    def launch(
        self,
        grid: tuple[int, int, int],
        threads: int,
        arguments: ctypes.Structure,
        shared_bytes: int = 0,
        *,
        overlaps: bool = False,
    ) -> None:
        """Queue the kernel on torch's current stream of its GPU; the arguments are copied.

        One that ``overlaps`` may start before the kernel before it has ended, for whose results
        it waits itself (``await_kernels`` in ``_cuda.cuh``). GPUs can from compute capability
        9.0 on.

        Raises:
            RuntimeError: The driver refused the launch; the message says why.
        """
        device = self._device
        if torch._C._cuda_getDevice() != device:
            with torch.cuda.device(device):
                self.launch(grid, threads, arguments, shared_bytes, overlaps=overlaps)
            return
        if device not in _entered.devices:
            _enter(device, self._context)
        parameter = ctypes.c_void_p(ctypes.addressof(arguments))
        stream = torch._C._cuda_getCurrentRawStream(device)
        if overlaps:
            status = self._launch_overlapping(grid, threads, parameter, shared_bytes, stream)
        else:
            (status,) = self._launch(
                *(self._function, *grid, threads, 1, 1, shared_bytes),
                *(stream, ctypes.addressof(parameter), 0),
            )
        if status:
            _check("driver", status, f"launch {self.name} on a grid of {grid}")

    def _launch_overlapping(
        self,
        grid: tuple[int, int, int],
        threads: int,
        parameter: ctypes.c_void_p,
        shared_bytes: int,
        stream: int,
    ) -> Any:
        from cuda.bindings import driver

        attribute = driver.CUlaunchAttribute()
        attribute.id = (
            driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        )
        attribute.value.programmaticStreamSerializationAllowed = 1
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = grid
        config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
        config.sharedMemBytes, config.hStream = shared_bytes, driver.CUstream(stream)
        config.attrs, config.numAttrs = [attribute], 1
        (status,) = driver.cuLaunchKernelEx(
            config, self._function, ctypes.addressof(parameter), 0
        )
        return status


@cache
def unavailable(device_index: int | None = None) -> str | None:
    """Say in one clause why kernels cannot be compiled and run, or return ``None`` if they can.

    ``None`` asks about the machine: whether any of its GPUs will do. This initialises CUDA.
    """
    if torch.version.cuda is None:
        return "this PyTorch was built without CUDA"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    found = _compiler()
    if isinstance(found, str):
        return found
    if device_index is not None:
        return _too_old(device_index) or _too_new(device_index)
    reasons = [unavailable(index) for index in range(torch.cuda.device_count())]
    return None if None in reasons else reasons[0]


def version() -> tuple[int, int]:
    """Return the version of NVRTC.

    Raises:
        RuntimeError: It is missing; the message says how to install it.
    """
    found = _compiler()
    if isinstance(found, str):
        raise RuntimeError(found)
    return found


def compile(source: Path, defines: Defines, arch: str) -> bytes:
    """Compile a kernel's file for ``arch``, as in ``"sm_90"``; needs no GPU and no driver.

    Raises:
        RuntimeError: NVRTC is missing, or refuses the source; its log is in the message.
    """
    return _compile(source, defines, arch).cubin


def compile_with_log(source: Path, defines: Defines, arch: str) -> Compiled:
    """Compile as ``compile`` does; the log tells registers and spills of each kernel."""
    # from 12.8 on NVRTC may find the code in the driver's cache, and then there is no log
    return _compile(source, defines, arch, *(["--no-cache"] if version() >= (12, 8) else []))


def _compile(source: Path, defines: Defines, arch: str, *more: str) -> Compiled:
    version()
    from cuda.bindings import nvrtc

    options = [
        *_OPTIONS,
        *more,
        f"--gpu-architecture={arch}",
        f"--include-path={OPS}",
        f"--include-path={source.parent}",
        *(f"--define-macro={name}={value}" for name, value in defines),
    ]
    status, program = nvrtc.nvrtcCreateProgram(
        source.read_bytes(), str(source).encode(), 0, None, None
    )
    _check("nvrtc", status, f"read {source.name}")
    try:
        (failed,) = nvrtc.nvrtcCompileProgram(
            program, len(options), [option.encode() for option in options]
        )
        status, size = nvrtc.nvrtcGetProgramLogSize(program)
        _check("nvrtc", status, "give its log")
        log = bytearray(size)
        nvrtc.nvrtcGetProgramLog(program, log)
        text = log.rstrip(b"\0").decode(errors="replace").strip()
        _check("nvrtc", failed, f"compile {source.name} for {arch} with {dict(defines)}", text)
        status, size = nvrtc.nvrtcGetCUBINSize(program)
        _check("nvrtc", status, f"make code for {arch}")
        cubin = bytearray(size)
        nvrtc.nvrtcGetCUBIN(program, cubin)
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    return Compiled(bytes(cubin), text)


@cache
def kernel(
    source: Path, entry: str, defines: Defines, device_index: int, shared_bytes: int = 0
) -> Kernel:
    """Return a kernel ready to launch: from this process, the cache folder, or the compiler.

    ``shared_bytes`` is the most dynamic shared memory that a launch will ask for.

    Raises:
        RuntimeError: This GPU or this installation cannot; the message says why.
    """
    why = unavailable(device_index)
    if why is not None:
        raise RuntimeError(f"{entry}: its CUDA kernel cannot run here: {why}")
    from cuda.bindings import driver

    context = _context(device_index)
    with torch.cuda.device(device_index), _relaxed_capture():
        _enter(device_index, context)
        module = _module(source, defines, device_index)
        status, function = driver.cuModuleGetFunction(module, entry.encode())
        _check("driver", status, f"find {entry} in {source.name}")
        if shared_bytes > _SHARED_BYTES:
            (status,) = driver.cuFuncSetAttribute(
                function,
                driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                shared_bytes,
            )
            _check("driver", status, f"give {entry} {shared_bytes} bytes of shared memory")
    return Kernel(entry, device_index, function, context)


@cache
def multiprocessors(device_index: int) -> int:
    """Return how many multiprocessors the GPU has."""
    return torch.cuda.get_device_properties(device_index).multi_processor_count


@cache
def shared_memory(device_index: int) -> tuple[int, int]:
    """Return how many bytes of shared memory a block may have, and a multiprocessor has."""
    # torch's stubs lack the first
    properties: Any = torch.cuda.get_device_properties(device_index)
    return (
        properties.shared_memory_per_block_optin,
        properties.shared_memory_per_multiprocessor,
    )


@contextmanager
def _relaxed_capture() -> Iterator[None]:
    """Let this thread load code also while a CUDA graph is being captured."""
    from cuda.bindings import driver

    relaxed = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
    status, mode = driver.cuThreadExchangeStreamCaptureMode(relaxed)
    _check("driver", status, "change the capture mode")
    try:
        yield
    finally:
        driver.cuThreadExchangeStreamCaptureMode(mode)


@cache
def _module(source: Path, defines: Defines, device_index: int) -> Any:
    """Load the machine code of one file on the current GPU."""
    from cuda.bindings import driver

    status, module = driver.cuModuleLoadData(_cubin(source, defines, _arch(device_index)))
    _check("driver", status, f"load {source.name}")
    return module


class _Entered(threading.local):
    """The GPUs whose context this thread has had in hand."""

    def __init__(self) -> None:
        self.devices: set[int] = set()


_entered = _Entered()


def _enter(device_index: int, context: Any) -> None:
    """Give this thread the GPU's context if it has none.

    One that has only been handed reused memory, as autograd's threads may have been, has none.
    """
    from cuda.bindings import driver

    status, current = driver.cuCtxGetCurrent()
    _check("driver", status, "name the current context")
    if not int(current):
        _check("driver", driver.cuCtxSetCurrent(context)[0], "choose the GPU")
    _entered.devices.add(device_index)


@cache
def _context(device_index: int) -> Any:
    """Return the context in which torch uses the GPU."""
    from cuda.bindings import driver

    torch.cuda.init()
    status, device = driver.cuDeviceGet(device_index)
    _check("driver", status, f"find GPU {device_index}")
    status, context = driver.cuDevicePrimaryCtxRetain(device)
    _check("driver", status, f"open GPU {device_index}")
    return context


@cache
def _compiler() -> tuple[int, int] | str:
    """Return the version of NVRTC, or why it cannot be used."""
    try:
        from cuda.bindings import nvrtc

        status, major, minor = nvrtc.nvrtcVersion()
    except ImportError:
        return f"the CUDA kernels need cuda-bindings: {_INSTALL}"
    except RuntimeError as error:
        # cuda-bindings finds the library itself at the first call
        return f"the CUDA kernels need NVRTC ({error}): {_INSTALL}"
    if status:
        return f"NVRTC answers {status.name}"
    if torch.cuda.is_available():
        from cuda.bindings import driver

        status, number = driver.cuDriverGetVersion()
        if not status and number // 1000 < major:
            return (
                f"NVRTC {major}.{minor} is newer than the driver, which knows CUDA "
                f"{number // 1000}.{number % 1000 // 10}: update the driver, or "
                f"pip install 'cuda-bindings=={number // 1000}.*' "
                f"nvidia-cuda-nvrtc-cu{number // 1000}"
            )
    return major, minor


def _too_old(device_index: int) -> str | None:
    capability = torch.cuda.get_device_capability(device_index)
    if capability >= OLDEST:
        return None
    return (
        f"the CUDA kernels need compute capability {OLDEST[0]}.{OLDEST[1]}, and "
        f"{torch.cuda.get_device_name(device_index)} has {capability[0]}.{capability[1]}"
    )


def _too_new(device_index: int) -> str | None:
    if _best_arch(device_index) is not None:
        return None
    major, minor = torch.cuda.get_device_capability(device_index)
    return (
        f"NVRTC {'.'.join(map(str, version()))} does not know compute capability "
        f"{major}.{minor}: pip install --upgrade cuda-bindings nvidia-cuda-nvrtc"
    )


def _best_arch(device_index: int) -> int | None:
    """Return the newest architecture whose machine code this GPU runs: of its own family."""
    from cuda.bindings import nvrtc

    status, known = nvrtc.nvrtcGetSupportedArchs()
    _check("nvrtc", status, "list what it compiles for")
    major, minor = torch.cuda.get_device_capability(device_index)
    own = 10 * major + minor
    return max((arch for arch in known if 10 * major <= arch <= own), default=None)


@cache
def _arch(device_index: int) -> str:
    # what only this GPU has, as registers handed over, is known by a letter
    best = _best_arch(device_index)
    return "sm_90a" if best == 90 else f"sm_{best}"


def hands_over_registers(device_index: int) -> bool:
    """Say whether warps of a block can give registers to others (``setmaxnreg``)."""
    return _arch(device_index) == "sm_90a"


def _check(library: str, status: Any, what: str, log: str = "") -> None:
    """Raise if a call to the driver or to NVRTC did not succeed."""
    if not status:
        return
    who = "the CUDA driver" if library == "driver" else "NVRTC"
    raise RuntimeError(f"{who} could not {what}: {status.name}{log and chr(10)}{log}")


@cache
def _cubin(source: Path, defines: Defines, arch: str) -> bytes:
    """Return the machine code, from the cache folder if it is there."""
    folder = cache_folder()
    if folder is None:
        return compile(source, defines, arch)
    stored = folder / f"{source.stem}-{_key(source, defines, arch)}.cubin"
    found = _read(stored)
    if found is None:
        found = compile(source, defines, arch)
        _write(stored, found)
    return found


def cache_folder() -> Path | None:
    """Return the folder that compiled kernels are kept in; ``None`` for a user without one."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "mambakit" if os.path.isabs(base) else None


def _key(source: Path, defines: Defines, arch: str) -> str:
    """Hash all that the machine code depends on."""
    digest = hashlib.sha256(repr((version(), _OPTIONS, defines, arch)).encode())
    seen: set[Path] = set()
    pending = [source]
    while pending:
        file = pending.pop()
        if file in seen:
            continue
        seen.add(file)
        text = file.read_bytes()
        digest.update(hashlib.sha256(text).digest())
        for name in _INCLUDE.findall(text.decode()):
            places = (OPS / name, file.parent / name, source.parent / name)
            pending.extend(place.resolve() for place in places if place.exists())
    return digest.hexdigest()[:40]


def _read(stored: Path) -> bytes | None:
    """Return the code kept in a file, or ``None`` if there is none or it is damaged."""
    try:
        content = stored.read_bytes()
    except OSError:
        return None
    head = len(_MAGIC) + _DIGEST_BYTES
    code = content[head:]
    whole = content[:head] == _MAGIC + hashlib.sha256(code).digest()
    return code if whole else None


def _write(stored: Path, code: bytes) -> None:
    """Keep the code for later processes; where the folder cannot be written, do without."""
    try:
        stored.parent.mkdir(parents=True, exist_ok=True)
        handle, unfinished = tempfile.mkstemp(dir=stored.parent, suffix=".tmp")
        with os.fdopen(handle, "wb") as file:
            file.write(_MAGIC + hashlib.sha256(code).digest() + code)
        os.replace(unfinished, stored)
    except OSError:
        return
