"""Laws of the allocator's setting."""

import platform
import subprocess
import sys

import pytest
import torch

from mambakit.training.memory import keep_freed_memory, refuse_too_large

# A block far above glibc's largest threshold (32 MiB), freed: does the process still hold it?
_PROBE = """
import ctypes, sys
from mambakit.training.memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
c = ctypes.CDLL(None)
c.malloc.restype, c.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
c.free.argtypes = [ctypes.c_void_p]
size = 256 << 20
block = c.malloc(size)
ctypes.memset(block, 1, size)
c.free(block)
status = open("/proc/self/status").read()
print(status.split("VmRSS:")[1].split()[0])
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_a_freed_block_stays_with_the_process():
    resident = [
        int(subprocess.check_output([sys.executable, "-c", _PROBE, how]))  # KiB
        for how in ("keep", "do not")
    ]
    assert resident[0] - resident[1] > 200 << 10


def test_it_says_no_where_the_c_library_is_another(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert keep_freed_memory() is False


def test_a_lack_of_memory_is_one_sentence_and_other_errors_pass():
    needs = pytest.raises(RuntimeError, match="train: a vector needs more memory than")
    with needs, refuse_too_large("a vector"):
        torch.empty(2**50)
    with pytest.raises(RuntimeError, match=r"^else$"), refuse_too_large("a vector"):
        raise RuntimeError("else")
