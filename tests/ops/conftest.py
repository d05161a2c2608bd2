"""What the tests of all operations share: the backends and the one table of tolerances."""

import pytest
import torch

from mambakit.ops import _backends

_WHY_NOT = _backends.why_not_fused(torch.device("cpu"))

# By how much two ways of the same sum may differ. Never widened for one test.
_TOLERANCE = {
    torch.float64: {"rtol": 1e-9, "atol": 1e-9},
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.float16: {"rtol": 2e-3, "atol": 2e-3},
    torch.bfloat16: {"rtol": 1.6e-2, "atol": 1.6e-2},
}


@pytest.fixture(
    scope="session",
    params=[
        "reference",
        "parallel",
        pytest.param(
            "fused", marks=pytest.mark.skipif(_WHY_NOT is not None, reason=str(_WHY_NOT))
        ),
    ],
)
def backend(request):
    """Every backend that runs here."""
    return request.param


@pytest.fixture(
    scope="session",
    params=[
        "parallel",
        pytest.param(
            "fused", marks=pytest.mark.skipif(_WHY_NOT is not None, reason=str(_WHY_NOT))
        ),
    ],
)
def fast_backend(request):
    """Every backend that runs here and is judged against the reference."""
    return request.param


@pytest.fixture(scope="session")
def assert_near():
    """Assert that two tensors agree as well as the table asks of their dtype."""

    def check(got, wanted, message=None):
        torch.testing.assert_close(
            got, wanted.to(got.dtype), **_TOLERANCE[got.dtype], equal_nan=True, msg=message
        )

    return check
