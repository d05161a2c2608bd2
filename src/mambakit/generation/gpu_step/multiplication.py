"""Products by PyTorch's own library, in the graph of a step."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

# Set to anything, as PyTorch has it.
_UNCACHED = "PYTORCH_NO_CUDA_MEMORY_CACHING"


class Multiplication(NamedTuple):
    """``out = vectors matrix^T``, of short numbers; ``name`` is as a launch's.

    Sums are in float32, as far as PyTorch's ``allow_*_reduced_precision_reduction`` leave them
    so when they are queued; ``out`` is too, or of the vectors' dtype, and they are rounded.
    An ``out`` of three axes has sums over as many spans of the columns as it is long, to be
    added up later: more blocks, and no kernel that adds them.
    """

    name: str
    vectors: Tensor
    matrix: Tensor
    out: Tensor

    def run(self) -> None:
        """Queue it."""
        a, b = self.vectors, self.matrix.T
        if self.out.ndim == 3:
            spans = len(self.out), -1
            a, b = a.unflatten(1, spans).transpose(0, 1), b.unflatten(0, spans)
        multiply(a, b, self.out)


def multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    """Queue a product of CUDA tensors, or one for each span; nothing is allocated."""
    product = torch.mm if out.ndim == 2 else torch.bmm
    if out.dtype == a.dtype:
        product(a, b, out=out)
    else:
        product(a, b, out_dtype=out.dtype, out=out)


@contextmanager
def workspace_in(pool: torch.cuda.MemPool) -> Iterator[None]:
    """Let products of the current stream of a GPU work in memory of ``pool``, and of no other.

    PyTorch keeps such memory for each stream, where the products of a graph would meet those of
    whatever else has the stream, and gives it back at times (``torch.compile`` with graphs of
    its own does), though a graph needs it as long as it lives. So none is taken that is there,
    and PyTorch forgets what was made. Where PyTorch has been told to keep no memory, which is
    for debugging, pools hold none and what it forgets is gone: there it is not made to forget.
    """
    if _UNCACHED in os.environ:
        torch.cuda.current_blas_handle()
        yield
        return
    with torch.cuda.use_mem_pool(pool):
        torch._C._cuda_clearCublasWorkspaces()
        try:
            # made now, because nothing may be while a graph is captured
            torch.cuda.current_blas_handle()
            yield
        finally:
            torch._C._cuda_clearCublasWorkspaces()
