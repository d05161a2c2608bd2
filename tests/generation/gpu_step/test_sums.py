"""Sums of bits change with what they are of."""

import re

import pytest
import torch

from mambakit.generation.gpu_step import sums
from mambakit.generation.gpu_step.sums import sums_of_bits
from mambakit.ops import _cuda

_MASK = 2**64 - 1


def wanted(tensor):
    """The sum as the kernel's file defines it, of a tensor on a border of 16 bytes."""
    words = tensor.contiguous().flatten().view(torch.int16).long() & 0xFFFF
    whole = len(words) // 8 * 8
    long = words[:whole].view(-1, 2)
    long = (long[:, 0] | long[:, 1] << 16).tolist()
    total = sum((2 * j + 1) * word for j, word in enumerate(long))
    total += sum((2 * j + 1) * word for j, word in enumerate(words.tolist()) if j >= whole)
    total &= _MASK
    return total - 2**64 if total >= 2**63 else total


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_they_are_those_of_the_definition(dtype):
    tensors = [torch.randn(shape).to(dtype) for shape in (1, 5, 8, 1000, (70, 999), 0)]
    assert sums_of_bits(tensors) == [wanted(tensor) for tensor in tensors]
    assert sums_of_bits([]) == []


@pytest.mark.parametrize("at", [0, 1])
def test_one_change_and_one_exchange_show(at):
    tensor = torch.randn(100_001)[at:]  # at 1 it does not lie on a border of 16 bytes
    (before,) = sums_of_bits([tensor])
    seen = {before}
    for i in (0, 7, 99_999):
        tensor[i] += 1e-3
        seen.update(sums_of_bits([tensor]))
    tensor[[3, 50_000]] = tensor[[50_000, 3]]
    seen.update(sums_of_bits([tensor]))
    assert len(seen) == 5


def test_more_tensors_than_a_grid_has_rows(monkeypatch):
    monkeypatch.setattr(sums, "_MOST", 3)
    tensors = list(torch.randn(10, 16))
    assert sums_of_bits(tensors) == [wanted(tensor) for tensor in tensors]


def test_a_transposed_tensor_counts_as_its_numbers_lie_for_a_reader():
    tensor = torch.randn(6, 7).T
    assert sums_of_bits([tensor]) == sums_of_bits([tensor.contiguous()])


def test_the_kernel_compiles_without_spills():
    try:
        _cuda.version()
    except RuntimeError as error:
        pytest.skip(str(error))
    compiled = _cuda.compile_with_log(sums.SOURCE, sums.DEFINES, "sm_90")
    assert re.findall(r"(\d+) bytes spill stores", compiled.log) == ["0"]
