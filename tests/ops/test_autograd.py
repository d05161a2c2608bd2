"""What is said where PyTorch's own words would not help."""

import pytest
import torch

from mambakit.ops._autograd import refuse_transforms


def test_derivatives_by_torch_func_are_refused():
    def apply(x):
        refuse_transforms("f")
        return x.sum()

    sentence = r"^f: derivatives by torch\.func exist only with backend='reference'$"
    for transform in (torch.func.grad, torch.func.jacrev):
        with pytest.raises(RuntimeError, match=sentence):
            transform(apply)(torch.ones(2))


def test_everybody_else_passes():
    x = torch.ones(2, requires_grad=True)

    def apply(x):
        refuse_transforms("f")
        return 2 * x

    assert torch.autograd.functional.jacobian(apply, x).tolist() == [[2, 0], [0, 2]]
