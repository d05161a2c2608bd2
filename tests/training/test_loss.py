"""Laws of the loss: it is PyTorch's cross-entropy, in float32, whatever the logits."""

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from mambakit.training import loss as module
from mambakit.training.loss import cross_entropy


def draw(b=2, l=7, v=11, dtype=torch.float32, scale=3.0):
    torch.manual_seed(0)
    logits = (scale * torch.randn(b, l, v)).to(dtype).requires_grad_()
    return logits, torch.randint(v, (b, l))


def expected(logits, targets):
    logits = logits.detach().requires_grad_()
    loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
    loss.backward()
    return loss.detach(), logits.grad


@pytest.mark.parametrize("block", [1, 30, 1 << 18])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_and_gradient_are_pytorchs(monkeypatch, dtype, block):
    monkeypatch.setattr(module, "_BLOCK", block)
    logits, targets = draw(dtype=dtype)
    loss = cross_entropy(logits, targets)
    loss.backward()
    want, grad = expected(logits, targets)
    assert loss.dtype == torch.float32
    assert logits.grad.dtype == dtype
    assert_close(loss.detach(), want)
    assert_close(logits.grad, grad)


def test_large_logits_do_not_overflow():
    logits, targets = draw(scale=1e4)
    loss = cross_entropy(logits, targets)
    loss.backward()
    assert torch.isfinite(loss)
    assert_close(loss.detach(), expected(logits, targets)[0])


def test_the_gradient_scales_with_what_is_above():
    logits, targets = draw()
    (cross_entropy(logits, targets) * 0.25).backward()
    assert_close(logits.grad, 0.25 * expected(logits, targets)[1])


def test_targets_may_be_a_strided_view():
    logits, _ = draw(l=6)
    tokens = torch.randint(11, (2, 7))
    loss = cross_entropy(logits, tokens[:, 1:])
    assert_close(loss.detach(), expected(logits, tokens[:, 1:])[0])


def test_a_nan_reaches_the_loss():
    logits, targets = draw()
    with torch.no_grad():
        logits[0, 0, 0] = torch.nan
    assert torch.isnan(cross_entropy(logits, targets))
