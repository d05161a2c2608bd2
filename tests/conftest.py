"""What every test starts from: its device, its seed, and memory that is poisoned."""

import os

import pytest
import torch


def pytest_addoption(parser):
    parser.addoption(
        "--device",
        default="cpu",
        help="where tests make their tensors, as in --device cuda; those marked cpu stay there",
    )


def pytest_configure(config):
    device = torch.device(config.getoption("--device"))
    if device.type == "cuda":
        # Cublas sums in a fixed order only with this, and is asked to below.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        if not torch.cuda.is_available():
            raise pytest.UsageError("--device cuda: there is no CUDA device")
    else:
        # Triton asks for this when it is imported, which the next line does if it is installed.
        os.environ.setdefault("TRITON_INTERPRET", "1")
    # Workers share the cores: threads that wait for one another while others have their cores
    # took ten times as long. Tests of threads set their number themselves.
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max(1, torch.get_num_threads() // workers))
    # Also fills torch.empty with NaN, so that output which no kernel wrote is seen.
    torch.use_deterministic_algorithms(True)


@pytest.fixture(scope="session")
def chosen_device(request):
    """The device of ``--device``."""
    return torch.device(request.config.getoption("--device"))


@pytest.fixture(autouse=True)
def device(request, chosen_device):
    """The device that a test makes its tensors on where it names none."""
    # what refuses is handed tensors that were made while tests were collected
    stays = any(map(request.node.get_closest_marker, ("cpu", "refuses")))
    if chosen_device.type == "cpu" or stays:
        yield torch.device("cpu")
        return
    with chosen_device:
        yield chosen_device


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
