"""What the tests of all operations share: the backends and the one table of tolerances."""

import pytest
import torch

from mambakit.ops import _backends, _cuda
from tests import emulator

# By how much two ways of the same sum may differ. Never widened for one test.
_TOLERANCE = {
    torch.float64: {"rtol": 1e-9, "atol": 1e-9},
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.float16: {"rtol": 2e-3, "atol": 2e-3},
    torch.bfloat16: {"rtol": 1.6e-2, "atol": 1.6e-2},
}


def _must_run(backend, device):
    """Skip the fused backend where nobody built it; on a GPU that was asked for it must run."""
    why_not = _backends.why_not_fused("all", device) if backend == "fused" else None
    if why_not is not None:
        (pytest.skip if device.type == "cpu" else pytest.fail)(why_not)


@pytest.fixture(scope="session", params=["reference", "parallel", "fused"])
def backend(request, chosen_device):
    """Every backend that runs here."""
    _must_run(request.param, chosen_device)
    return request.param


@pytest.fixture(scope="session", params=["parallel", "fused"])
def fast_backend(request, chosen_device):
    """Every backend that runs here and is judged against the reference."""
    _must_run(request.param, chosen_device)
    return request.param


@pytest.fixture
def fused(chosen_device):
    """Ask for the fused backend."""
    _must_run("fused", chosen_device)


@pytest.fixture
def emulated(monkeypatch, chosen_device):
    """The device whose tensors the CUDA kernels' host code takes in this test.

    With ``--device cuda`` it is the GPU. Without, it is the processor: the emulator runs the
    kernels in the place of the compiler and the driver.
    """
    if chosen_device.type == "cuda":
        return chosen_device
    why_not = emulator.unavailable()
    if why_not is not None:
        pytest.skip(why_not)
    monkeypatch.setattr(_cuda, "kernel", emulator.kernel)
    monkeypatch.setattr(_cuda, "multiprocessors", lambda _: emulator.MULTIPROCESSORS)
    monkeypatch.setattr(_cuda, "shared_memory", lambda _: emulator.SHARED_MEMORY)
    monkeypatch.setattr(_cuda, "hands_over_registers", lambda _: True)
    return torch.device("cpu")


@pytest.fixture(scope="session")
def assert_near():
    """Assert that two tensors agree as well as the table asks of their dtype."""

    def check(got, wanted, message=None):
        torch.testing.assert_close(
            got, wanted.to(got.dtype), **_TOLERANCE[got.dtype], equal_nan=True, msg=message
        )

    return check
