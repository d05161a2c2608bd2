"""Inputs for the tests of the causal convolution."""

import pytest
import torch


@pytest.fixture(scope="session")
def draw():
    """Draw (x, weight, bias, state)."""

    def make(b=2, l=9, d=3, w=4, *, dtype=torch.float64):
        return (
            torch.randn(b, l, d, dtype=dtype),
            torch.randn(d, w, dtype=dtype),
            torch.randn(d, dtype=dtype),
            torch.randn(b, d, w - 1, dtype=dtype),
        )

    return make
