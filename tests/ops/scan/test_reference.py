"""The definition itself, where the laws of every backend do not reach."""

import torch
from torch.testing import assert_close

from mambakit.ops import selective_scan
from mambakit.ops.scan.reference import softplus


def test_softplus_is_exact_in_float64():
    x = torch.linspace(-60, 60, 4001, dtype=torch.float64)
    assert_close(softplus(x), torch.logaddexp(x, x.new_zeros(())), rtol=1e-15, atol=0)


def test_three_steps_by_hand():
    x = torch.tensor([[[1.0], [2.0], [3.0]]])
    dt = torch.tensor([[[0.5], [1.0], [2.0]]])
    A, ones = torch.tensor([[-1.0]]), torch.ones(1, 3, 1)
    h1 = 0.5
    h2 = h1 * torch.exp(torch.tensor(-1.0)) + 2
    h3 = h2 * torch.exp(torch.tensor(-2.0)) + 6
    y, state = selective_scan(x, dt, A, ones, 2 * ones, torch.ones(1), backend="reference")
    assert_close(y[0, :, 0], torch.stack([torch.tensor(2 * h1 + 1), 2 * h2 + 2, 2 * h3 + 3]))
    assert_close(state[0, 0, 0], h3)


def test_all_of_autograd_works(draw):
    inputs = draw(b=1, l=3, d=2, n=2)

    def scan(x):
        return selective_scan(**inputs | {"x": x}, backend="reference").y

    x, tangent = inputs["x"], torch.ones_like(inputs["x"])
    forward = torch.func.jvp(scan, (x,), (tangent,))[1]
    assert_close(forward, torch.autograd.functional.jvp(scan, x, tangent)[1])
    rows = torch.func.vmap(scan)(torch.stack([x, 2 * x]))
    assert_close(rows, torch.stack([scan(x), scan(2 * x)]))
