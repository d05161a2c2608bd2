"""Inputs of a scan with the signs that it expects, and its gradients."""

import pytest
import torch

from mambakit.ops import selective_scan


@pytest.fixture(scope="session")
def draw():
    """Draw every argument of ``selective_scan``; a name in ``without`` is left out."""

    def make(
        b=2,
        l=9,
        d=6,
        n=4,
        *,
        B="token",
        C="token",
        g=2,
        dtype=torch.float64,
        seed=0,
        without=(),
    ):
        source = torch.Generator().manual_seed(seed)

        def normal(*shape):
            # the same numbers on every device
            drawn = torch.randn(*shape, generator=source, dtype=torch.float64, device="cpu")
            return drawn.to(torch.get_default_device(), dtype)

        forms = {"constant": (d, n), "token": (b, l, n), "grouped": (b, l, g, n)}
        inputs = {
            "x": normal(b, l, d),
            "dt": normal(b, l, d),
            "A": -normal(d, n).abs() - 0.05,
            "B": normal(*forms[B]),
            "C": normal(*forms[C]),
            "D": normal(d),
            "gate": normal(b, l, d),
            "dt_bias": normal(d) - 1,
            "state": normal(b, d, n),
        }
        return {k: v for k, v in inputs.items() if k not in without} | {"dt_softplus": True}

    return make


@pytest.fixture(scope="session")
def gradients():
    """Run a scan and the gradients of a fixed weighting of all that it returns."""

    def run(inputs, backend, *, weigh_state=True):
        leaves = {
            k: v.detach().requires_grad_()
            for k, v in inputs.items()
            if torch.is_tensor(v) and v.is_floating_point()
        }
        y, state = selective_scan(**{**inputs, **leaves}, backend=backend)
        source = torch.Generator().manual_seed(1)
        loss = (y * torch.randn(y.shape, generator=source, device="cpu").to(y)).sum()
        if weigh_state:
            weights = torch.randn(state.shape, generator=source, device="cpu").to(state)
            loss = loss.to(state.dtype) + (state * weights).sum()
        found = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
        return {
            "y": y.detach(),
            "last": state.detach(),
            **{f"d{k}": g for k, g in zip(leaves, found, strict=True)},
        }

    return run
