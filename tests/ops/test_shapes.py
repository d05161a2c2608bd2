"""Checks at the door: what passes, and what a message says."""

import pytest
import torch

from mambakit.ops._shapes import check_axes, check_floats

pytestmark = pytest.mark.cpu


def test_axes_are_bound_to_sizes():
    a, b = torch.ones(2, 3), torch.ones(3, 4)
    assert check_axes("f", a=(a, "i j"), b=(b, "j k"), c=(None, "k")) == {
        "i": 2,
        "j": 3,
        "k": 4,
    }


def test_a_tensor_that_disagrees_is_named_with_both_shapes():
    a, b = torch.ones(2, 3), torch.ones(4, 4)
    with pytest.raises(ValueError, match=r"^f: b must have shape \(j=3, k\), got \(4, 4\)$"):
        check_axes("f", a=(a, "i j"), b=(b, "j k"))


def test_a_tensor_of_another_rank_binds_nothing():
    with pytest.raises(ValueError, match=r"^f: a must have shape \(i, j\), got \(5,\)$"):
        check_axes("f", a=(torch.ones(5), "i j"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_four_dtypes_pass(dtype):
    check_floats("f", a=torch.ones(2, dtype=dtype), b=None)


@pytest.mark.refuses
@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1.0], "b must be a tensor, got list"),
        (torch.ones(2, dtype=torch.int8), "b must be .*, got int8"),
        (torch.ones(2, dtype=torch.complex128), "b must be .*, got complex128"),
        (torch.ones(2, device="meta"), "b must be on cpu like the others, got meta"),
        (torch.eye(2).to_sparse_csr(), "b must be a dense tensor, got layout sparse_csr"),
    ],
)
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_anything_else_is_refused(value, message):
    with pytest.raises(ValueError, match=f"^f: {message}$"):
        check_floats("f", a=torch.ones(1), b=value)


@pytest.mark.refuses
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_nested_tensor_is_refused(layout):
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=layout)
    with pytest.raises(ValueError, match=r"^f: a must be a dense tensor, got a nested one$"):
        check_floats("f", a=nested)


@pytest.mark.refuses
def test_a_tensor_that_is_needed_may_not_be_none():
    check_floats("f", "a", a=torch.ones(1), b=None)
    with pytest.raises(ValueError, match=r"^f: b must be a tensor, got None$"):
        check_floats("f", "a", "b", a=torch.ones(1), b=None)
