"""The compiled step (``step.cpp``) as Python calls it."""

import ctypes
from functools import cache

import torch
from torch import Tensor

from mambakit.ops import _native

_int, _pointer, _double = ctypes.c_int64, ctypes.c_void_p, ctypes.c_double

# The codes of enum Storage.
STORAGE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 4}


class StepMatrix(ctypes.Structure):
    """A matrix; see ``step.cpp``."""

    _fields_ = (
        ("weights", _pointer),
        ("scales", _pointer),
        ("rows", _int),
        ("columns", _int),
    )


class StepLayer(ctypes.Structure):
    """The parameters of one layer; see ``step.cpp``."""

    _fields_ = (
        ("gain", _pointer),
        ("eps", _double),
        ("in_proj", StepMatrix),
        ("in_bias", _pointer),
        ("conv", _pointer),
        ("conv_bias", _pointer),
        ("x_proj", StepMatrix),
        ("selection_eps", _double),
        ("dt_proj", StepMatrix),
        ("dt_bias", _pointer),
        ("A", _pointer),
        ("D", _pointer),
        ("out_proj", StepMatrix),
        ("out_bias", _pointer),
    )


class StepModel(ctypes.Structure):
    """A whole model; see ``step.cpp``."""

    _fields_ = (
        ("storage", _int),
        ("layers", _int),
        ("m", _int),
        ("d", _int),
        ("n", _int),
        ("r", _int),
        ("w", _int),
        ("layer", ctypes.POINTER(StepLayer)),
        ("gain", _pointer),
        ("eps", _double),
        ("head", StepMatrix),
    )


class StepCall(ctypes.Structure):
    """The input and output of a few tokens; see ``step.cpp``."""

    _fields_ = (
        ("b", _int),
        ("threads", _int),
        ("x", _pointer),
        ("conv", ctypes.POINTER(_pointer)),
        ("ssm", ctypes.POINTER(_pointer)),
        ("new_conv", _pointer),
        ("new_ssm", _pointer),
        ("logits", _pointer),
        ("scratch", _pointer),
        ("l", _int),
    )


class StepLibrary:
    """The functions of one instruction set's library."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._step = library.mk_step
        self._step.argtypes = [ctypes.POINTER(StepModel), ctypes.POINTER(StepCall)]
        self._step.restype = ctypes.c_bool
        self._scratch = library.mk_step_scratch
        self._scratch.argtypes = [ctypes.POINTER(StepModel), _int, _int]
        self._scratch.restype = _int
        self._quantise = library.mk_step_quantise
        self._quantise.argtypes = [_pointer, _int, _int, _pointer, _pointer, ctypes.c_int32]
        self._quantise.restype = None
        self._large_pages = library.mk_step_large_pages
        self._large_pages.argtypes = [_pointer, _int]
        self._large_pages.restype = None

    def step(self, model: StepModel, call: StepCall) -> None:
        """Run one token.

        Raises:
            RuntimeError: There was no memory to work in.
        """
        if not self._step(model, call):
            raise RuntimeError("CPUStep: there is not enough memory to work in")

    def scratch(self, model: StepModel, b: int, threads: int) -> int:
        """Return how many floats ``StepCall.scratch`` must have room for."""
        return self._scratch(model, b, threads)

    def quantise(self, values: Tensor, weights: Tensor, scales: Tensor) -> None:
        """Round float32 ``values`` to int8 ``weights``, with a scale for each row."""
        self._quantise(
            values.data_ptr(),
            *values.shape,
            weights.data_ptr(),
            scales.data_ptr(),
            torch.get_num_threads(),
        )

    def large_pages(self, memory: Tensor) -> None:
        """Ask the system for large pages under a tensor that is not yet written."""
        self._large_pages(memory.data_ptr(), memory.nbytes)


@cache
def _functions(library: ctypes.CDLL) -> StepLibrary:
    return StepLibrary(library)


def step_library() -> StepLibrary:
    """Return the functions for this processor.

    Raises:
        RuntimeError: There is no CPU library; the message says why.
    """
    return _functions(_native.library())
