"""How kernels learn of a pack: lists of spans of time, made on the host and sent to the GPU.

The lists come from ``cu_seqlens`` on the CPU, so nothing waits for the GPU. They travel to it
as arguments of a small kernel, on the same stream as the kernels that read them: there is no
pinned memory to keep alive, and a CUDA graph that captures the launch holds its own copy.
"""

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .. import _cuda

SOURCE = Path(__file__).with_name("send.cu")

# Span in span.cuh, field by field.
SPAN = np.dtype(
    [
        ("begin", np.int64),
        *((name, np.int32) for name in ("steps", "sequence", "before", "after")),
        *((name, np.int32) for name in ("chunk", "unused")),
    ]
)
_MANY = 2**31 - 1  # the most that an int holds

_WORDS = 500  # as in send.cu

Words = NDArray[np.int64]
Spans = NDArray[Any]  # of SPAN


class _Arguments(ctypes.Structure):
    # Arguments in send.cu, field by field.
    _fields_ = [
        ("words", ctypes.c_int64 * _WORDS),
        ("to", ctypes.c_void_p),
        ("count", ctypes.c_int64),
    ]


def starts_of(cu_seqlens: bytes) -> Words:
    """Return where sequences begin, and where the last ends, from the bytes of ``cu_seqlens``.

    Bytes can be the key of a cache, as the layers of a model all ask for the same lists.
    """
    return np.frombuffer(cu_seqlens, np.int64)


def bytes_of(cu_seqlens: Tensor) -> bytes:
    """Return the bytes of ``cu_seqlens`` (s+1), int64 on the CPU."""
    return cu_seqlens.numpy().tobytes()


def cut(starts: Words, steps: Words | int) -> Spans:
    """Cut each sequence into spans of ``steps`` steps, the last of what is left; in order.

    ``steps`` may be a number for each sequence. ``chunk`` counts the spans of sequences that
    have more than one; it is 0 for the others, which ask for no place of their own.
    """
    lengths = np.diff(starts)
    steps = np.broadcast_to(steps, lengths.shape)
    counts = -(-lengths // steps)
    sequence = np.repeat(np.arange(len(lengths)), counts)
    within = np.arange(len(sequence)) - np.repeat(np.cumsum(counts) - counts, counts)
    several = (counts > 1)[sequence]
    spans = np.zeros(len(sequence), SPAN)
    before = within * steps[sequence]
    own = np.minimum(steps[sequence], lengths[sequence] - before)
    spans["begin"] = starts[sequence] + before
    spans["steps"] = own
    spans["sequence"] = sequence
    spans["before"] = np.minimum(before, _MANY)
    spans["after"] = np.minimum(lengths[sequence] - before - own, _MANY)
    spans["chunk"] = np.where(several, np.cumsum(several) - 1, 0)
    return spans


def words_of(array: NDArray[Any]) -> Words:
    """Return a list of spans, or of int64, as words."""
    return np.ascontiguousarray(array).view(np.int64)


def send(words: Words, like: Tensor) -> Tensor:
    """Return the words in the memory of ``like``'s device, once its current stream is there.

    Raises:
        RuntimeError: The kernel cannot be compiled or run on this GPU.
    """
    table = like.new_empty(len(words), dtype=torch.int64)
    kernel = _cuda.kernel(SOURCE, "write_words", (), like.device.index)
    for first in range(0, len(words), _WORDS):
        part = words[first : first + _WORDS]
        arguments = _Arguments(to=table.data_ptr() + first * 8, count=len(part))
        ctypes.memmove(arguments.words, part.ctypes.data, part.nbytes)
        kernel.launch((1, 1, 1), 256, arguments)
    return table
