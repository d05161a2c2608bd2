"""What is in a model's parameters, as a number for each."""

import ctypes
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from mambakit.ops import _cuda

SOURCE = Path(__file__).with_name("sums.cu")
THREADS = 256
DEFINES: _cuda.Defines = (("THREADS", str(THREADS)),)

# Blocks for each tensor: many parameters are small, and the largest has a tenth of all bytes.
_BLOCKS = 64
# A grid has no more rows.
_MOST = 65535


class _Arguments(ctypes.Structure):
    _fields_ = (("tensors", ctypes.c_void_p), ("parts", ctypes.c_void_p))


def sums_of_bits(tensors: Sequence[Tensor]) -> list[int]:
    """Return a number for each tensor that tells what is in it, in one launch.

    As ``stand_in.sum_of_bits`` does, it changes with any one change of a number or exchange of
    two, and practically always with more. The numbers are others than that one's.

    Args:
        tensors: Tensors on one GPU, of dtypes of at least two bytes.

    Raises:
        RuntimeError: The kernel cannot be compiled or launched; the message says why.
    """
    if not tensors:
        return []
    device = tensors[0].device
    dense = [tensor.detach().contiguous() for tensor in tensors]
    kernel = _cuda.kernel(SOURCE, "sums", DEFINES, tensors[0].get_device())
    places = torch.tensor([(one.data_ptr(), one.nbytes) for one in dense]).to(device)
    parts = torch.empty(len(dense), _BLOCKS, dtype=torch.int64, device=device)
    for first in range(0, len(dense), _MOST):
        some = places[first : first + _MOST]
        arguments = _Arguments(some.data_ptr(), parts[first].data_ptr())
        kernel.launch((_BLOCKS, len(some), 1), THREADS, arguments)
    return parts.sum(dim=1).tolist()
