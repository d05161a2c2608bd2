"""Laws of the loss: it is PyTorch's cross-entropy, in float32, whatever the logits."""

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from mambakit.training import loss as module
from mambakit.training.loss import cross_entropy, linear_cross_entropy


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


@pytest.mark.parametrize("block", [1, 30, 1 << 18])
def test_steps_without_a_target_are_passed_over_whatever_their_logits(monkeypatch, block):
    monkeypatch.setattr(module, "_BLOCK", block)
    logits, targets = draw()
    targets[0, 2:5] = targets[1, -1] = -100
    want, grad = expected(logits, targets)
    with torch.no_grad():
        logits[targets < 0] = torch.nan
    loss = cross_entropy(logits, targets)
    loss.backward()
    assert_close(loss.detach(), want)
    assert_close(logits.grad, grad)


def layer(b=2, l=7, m=5, v=11, dtype=torch.float32, weight_dtype=None):
    torch.manual_seed(0)
    x = torch.randn(b, l, m, dtype=dtype).requires_grad_()
    weight = torch.randn(v, m, dtype=weight_dtype or dtype).requires_grad_()
    return x, weight, torch.randint(v, (b, l))


def without_logits(x, weight, targets):
    """The form that a GPU takes, wherever the tensors are."""
    return module._without_logits(x, weight, targets, module._score)


@pytest.mark.parametrize("fused", [linear_cross_entropy, without_logits])
@pytest.mark.parametrize("logits", [1, 30, 1 << 18])
def test_a_layer_and_its_loss_are_pytorchs_two(monkeypatch, logits, fused):
    monkeypatch.setattr(module, "_LOGITS", logits)
    x, weight, targets = layer(dtype=torch.float64)
    loss = fused(x, weight, targets)
    gradients = torch.autograd.grad(0.25 * loss, (x, weight))
    scores = (x @ weight.T).flatten(0, 1)
    want = F.cross_entropy(scores, targets.flatten())
    assert loss.dtype == torch.float32
    assert_close(loss.double(), want, rtol=1e-6, atol=1e-6)
    for gradient, expected in zip(
        gradients, torch.autograd.grad(0.25 * want, (x, weight)), strict=True
    ):
        assert gradient.dtype == torch.float64
        assert_close(gradient, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("fused", [linear_cross_entropy, without_logits])
@pytest.mark.parametrize("unwanted", [[0, 5], range(14)])
def test_a_layer_and_its_loss_pass_over_steps_without_a_target(fused, unwanted):
    x, weight, targets = layer()
    targets.view(-1)[list(unwanted)] = -1
    loss = fused(x, weight, targets)
    logits = (x @ weight.T).flatten(0, 1)
    want = F.cross_entropy(logits, targets.flatten(), ignore_index=-1, reduction="sum")
    want = want / max(1, 14 - len(unwanted))
    assert_close(loss, want)
    for gradient, expected in zip(
        *(torch.autograd.grad(each, (x, weight)) for each in (loss, want)), strict=True
    ):
        assert_close(gradient, expected)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_the_weights_gradient_is_summed_wide(monkeypatch, weight_dtype, device):
    """Of hundreds of short sums of bfloat16, most would be lost in rounding."""
    monkeypatch.setattr(module, "_LOGITS", 11)
    dtype = torch.bfloat16
    x, weight, targets = layer(l=400, dtype=dtype, weight_dtype=weight_dtype)
    with torch.autocast(device.type, dtype=dtype, enabled=weight_dtype != dtype):
        loss = without_logits(x, weight, targets)
    gradients = torch.autograd.grad(loss, (x, weight))
    assert [g.dtype for g in gradients] == [dtype, weight_dtype]
    logits = x.float() @ weight.to(dtype).float().T
    want = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    assert_close(loss, want.float(), rtol=1e-3, atol=1e-3)
    for gradient, expected in zip(
        gradients, torch.autograd.grad(want, (x, weight)), strict=True
    ):
        error = (gradient.double() - expected.double()).norm() / expected.double().norm()
        assert error < 8e-3


@pytest.mark.parametrize("which", ["x", "weight", "neither"])
def test_only_the_gradients_that_are_wanted_are_made(which):
    x, weight, targets = layer()
    x.requires_grad_(which == "x")
    weight.requires_grad_(which == "weight")
    loss = without_logits(x, weight, targets)
    assert loss.requires_grad is (which != "neither")
    if which != "neither":
        loss.backward()
    assert (x.grad is not None) is (which == "x")
    assert (weight.grad is not None) is (which == "weight")


def test_without_gradients_only_the_loss_is_made():
    x, weight, targets = layer()
    with torch.no_grad():
        loss = without_logits(x, weight, targets)
    assert not loss.requires_grad
    assert_close(loss, linear_cross_entropy(x, weight, targets).detach())


def test_no_logits_of_a_whole_batch_exist(monkeypatch):
    monkeypatch.setattr(module, "_LOGITS", 64)
    x, weight, targets = layer(l=40)
    sizes = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            leaves = torch.utils._pytree.tree_leaves(out)
            sizes.extend(t.numel() for t in leaves if isinstance(t, torch.Tensor))
            return out

    with Sizes():
        without_logits(x, weight, targets).backward()
    assert max(sizes) == max(x.numel(), 64)


@pytest.mark.compiles
def test_the_compiled_score_is_the_score():
    torch.compiler.reset()
    logits, targets = draw(l=9)
    rows, targets = logits.detach()[0], targets[0]
    targets[3] = -100
    assert_close(module._compiled_score()(rows, targets), module._score(rows, targets))
