"""Memory: freed blocks stay with the process, and a lack of it is said in one sentence."""

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# Parameters of mallopt, from glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4


# On a CPU torch raises a bare RuntimeError, so that its words have to tell.
_TOO_LARGE = ("DefaultCPUAllocator", "Storage size calculation overflowed")


@contextmanager
def refuse_too_large(what: str) -> Iterator[None]:
    """Say in one sentence that ``what`` needs more memory than there is.

    Raises:
        RuntimeError: The block asked for memory that the device or the system refused.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        reason = str(error).partition("\n")[0]
        if not (
            isinstance(error, torch.OutOfMemoryError | MemoryError)
            or any(words in reason for words in _TOO_LARGE)
        ):
            raise
        raise RuntimeError(
            f"train: {what} needs more memory than this machine has: {reason}"
        ) from error


def keep_freed_memory() -> bool:
    """Tell the C library to keep memory that PyTorch frees on the CPU, and say if it does.

    By default glibc gives large blocks back to the system, and each step of training asks for
    the same ones again: the kernel then maps and clears them page by page. Kept, they make a
    step faster. The price: the process's resident memory stays at its peak until it ends, and
    the peak is somewhat higher. The setting holds for the whole process from now on; calling
    it again changes nothing.

    Returns:
        Whether it was done: ``False`` where the C library is not glibc.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # 0 blocks by mmap, which would be unmapped when freed; and a heap that is never cut
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, -1))
