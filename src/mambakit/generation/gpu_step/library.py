"""Products by PyTorch's own library, in the graph of a step."""

from typing import NamedTuple

import torch
from torch import Tensor


class Multiplication(NamedTuple):
    """``out = vectors matrix^T``, of short numbers; ``name`` is as a launch's.

    Sums are in float32; so is ``out``, or it is of the vectors' dtype, and they are rounded.
    """

    name: str
    vectors: Tensor
    matrix: Tensor
    out: Tensor

    def run(self) -> None:
        """Queue it."""
        multiply(self.vectors, self.matrix.T, self.out)


def multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    """Queue a product of CUDA tensors; nothing is allocated."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
