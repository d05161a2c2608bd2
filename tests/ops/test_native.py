"""Finding and loading the compiled library."""

import concurrent.futures
import ctypes
import os
import subprocess
import sys

import pytest
import torch

from mambakit.ops import _native

pytestmark = pytest.mark.cpu

WHY_NOT = _native.unavailable()

needs_library = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """A folder without libraries, and nothing remembered of the real one."""
    monkeypatch.setattr(_native, "_FOLDER", tmp_path)
    monkeypatch.setattr(_native, "_MISSING", tmp_path / "_cpu_missing.txt")
    _native._find.cache_clear()
    _native.open_library.cache_clear()
    yield tmp_path
    _native._find.cache_clear()
    _native.open_library.cache_clear()


@needs_library
def test_the_best_runnable_build_is_loaded():
    assert _native.isa() == _native.runnable()[-1]
    assert _native.library() is _native.open_library(_native.isa())


def test_a_build_that_failed_says_why(fresh):
    reason = "no C++ compiler was found when mambakit was installed; install g++ and reinstall"
    (fresh / "_cpu_missing.txt").write_text(reason + "\n")

    assert _native.unavailable() == f"the CPU library was not built: {reason}"
    with pytest.raises(RuntimeError, match="no C\\+\\+ compiler"):
        _native.library()
    with pytest.raises(RuntimeError, match="was not built"):
        _native.isa()


def test_a_tree_that_was_never_installed_says_so(fresh):
    assert "never installed" in str(_native.unavailable())


def test_a_damaged_library_is_one_clear_reason(fresh):
    for name in ("baseline", "neon"):
        (fresh / f"_cpu_{name}.so").write_bytes(b"not a library")

    assert "cannot be loaded" in str(_native.unavailable())


@needs_library
def test_a_library_of_another_version_is_refused(monkeypatch):
    monkeypatch.setattr(_native, "ABI_VERSION", -1)
    _native.open_library.cache_clear()
    try:
        with pytest.raises(RuntimeError, match="reinstall mambakit"):
            _native.open_library(_native.runnable()[-1])
    finally:
        _native.open_library.cache_clear()
        _native._find.cache_clear()


def _scan_sum(threads: int) -> float:
    from mambakit.ops.scan import cpu

    torch.set_num_threads(threads)
    x = torch.linspace(-1, 1, 2 * 96 * 64).view(2, 96, 64)
    B = torch.ones(2, 96, 8)
    y, _, _ = cpu.forward(
        x, x.abs(), -torch.ones(64, 8), B, B, None, None, None, None, False, False
    )
    return float(y.double().sum())


FORKED = """
import os, signal, sys, time, torch
from tests.ops.test_native import _scan_sum
before = _scan_sum(2)
child = os.fork()
if child == 0:
    os._exit(0 if _scan_sum(2) == before else 1)
# Looks are counted, not seconds: a machine that is held up holds up parent and child alike.
for _ in range(1200):
    ended, status = os.waitpid(child, os.WNOHANG)
    if ended:
        sys.exit(os.waitstatus_to_exitcode(status))
    time.sleep(0.05)
os.kill(child, signal.SIGKILL)
sys.exit("the child waits for ever")
"""


@needs_library
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_a_forked_child_runs_kernels_on_threads():
    done = subprocess.run(
        [sys.executable, "-c", FORKED], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@needs_library
def test_several_python_threads_may_call_at_once():
    threads = torch.get_num_threads()
    try:
        expected = _scan_sum(2)
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            assert set(pool.map(_scan_sum, [2] * 16)) == {expected}
    finally:
        torch.set_num_threads(threads)


@needs_library
def test_the_kernels_leave_denormals_as_they_were():
    _scan_sum(1)
    smallest = torch.tensor([2.0**-149])
    assert float(smallest * 1.0) > 0


@needs_library
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="torch brings no GNU OpenMP")
def test_threads_are_those_of_torch():
    fork = _native._openmp_fork()
    assert fork is not None
    assert fork == ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p).value
