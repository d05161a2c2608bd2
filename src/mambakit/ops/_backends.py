"""Which implementation of an operation runs: the one named, or the best for the device."""

from functools import cache
from importlib.util import find_spec
from typing import Literal, NamedTuple, get_args

import torch

from . import _cuda, _native

Backend = Literal["auto", "reference", "parallel", "fused"]
Implementation = Literal["reference", "parallel", "fused"]

BACKENDS: tuple[str, ...] = get_args(Backend)

# Why the processor has no fused kernels; None where it has them. Asked once, at import: loading
# a library is nothing that torch.compile could trace, a look into a dictionary is.
MISSING: dict[str, str | None] = {"cpu": _native.unavailable()}

# What there is in Triton for GPUs that the CUDA kernels do not serve.
_IN_TRITON = ("selective_scan", "selective_step")
_OLDEST_FOR_TRITON = (7, 5)


class Kernels(NamedTuple):
    """Which kernels ``"fused"`` means on a device: none, or for want of what not faster ones.

    ``why_not`` is the reason for which there are none, or, with ``"triton"`` on an NVIDIA GPU,
    for which the faster CUDA kernels cannot run.
    """

    kind: Literal["cpu", "cuda", "triton"] | None
    why_not: str | None


def _why_not_cuda(device_index: int | None) -> str | None:
    if torch.version.hip is not None:
        return "the CUDA kernels need an NVIDIA GPU"
    return _cuda.unavailable(device_index)


def _why_not_triton(device_type: str, device_index: int | None) -> str | None:
    return _ask_about_triton(device_type, device_index)


@cache
def _ask_about_triton(device_type: str, device_index: int | None) -> str | None:
    if find_spec("triton") is None:
        return "Triton, in which there is a slower one, is not installed"
    if device_type == "cuda" and not torch.cuda.is_available():
        return "Triton has no GPU either"
    if device_type == "cuda" and torch.version.hip is None:
        oldest = _OLDEST_FOR_TRITON
        if torch.cuda.get_device_capability(device_index) < oldest:
            return f"Triton's need {oldest[0]}.{oldest[1]}"
    return None


# An import must not start CUDA, which a process that forks later could then not use, so GPUs
# are asked about when one is met, and torch.compile must take the answer as it is. What says so
# is torch.compiler.assume_constant_result, which sets this mark and first loads all of the
# compiler: seconds that every import would pay.
_why_not_cuda._dynamo_marked_constant = True  # type: ignore[attr-defined]
_why_not_triton._dynamo_marked_constant = True  # type: ignore[attr-defined]


def fused_kernels(operation: str, device: torch.device) -> Kernels:
    """Say which kernels ``"fused"`` means for ``operation`` on ``device``.

    The operations that have a form in Triton have kernels on every GPU that Triton serves. Any
    other name stands for all operations together.
    """
    if device.type == "cpu":
        why_not = MISSING["cpu"]
        return Kernels("cpu" if why_not is None else None, why_not)
    if device.type == "cuda":
        why_not = _why_not_cuda(device.index)
        if why_not is None:
            return Kernels("cuda", None)
        if operation not in _IN_TRITON:
            return Kernels(None, why_not)
        why_not_triton = _why_not_triton("cuda", device.index)
        if why_not_triton is None:
            return Kernels("triton", why_not if torch.version.hip is None else None)
        return Kernels(None, f"{why_not}; {why_not_triton}")
    if device.type == "xpu" and operation in _IN_TRITON:
        why_not = _why_not_triton("xpu", device.index)
        return Kernels("triton" if why_not is None else None, why_not)
    return Kernels(None, f"there is no fused kernel for {device.type} tensors")


def why_not_fused(operation: str, device: torch.device) -> str | None:
    """Say why no fused kernel of ``operation`` runs on ``device``; ``None`` if one does."""
    kind, why_not = fused_kernels(operation, device)
    return None if kind is not None else why_not


def resolve(operation: str, backend: Backend, device: torch.device) -> Implementation:
    """Turn the caller's ``backend`` into the implementation that runs on ``device``.

    ``"auto"`` is ``"fused"`` where the device has it and ``"parallel"`` elsewhere. A backend
    that is named is never replaced by another.

    Raises:
        ValueError: ``backend`` is not the name of a backend.
        RuntimeError: ``"fused"`` is named and cannot run here; the message says why.
    """
    if backend == "reference" or backend == "parallel":
        return backend
    if backend != "auto" and backend != "fused":
        raise ValueError(f"{operation}: backend must be one of {BACKENDS}, got {backend!r}")
    kind, why_not = fused_kernels(operation, device)
    if kind is not None:
        return "fused"
    if backend == "fused":
        raise RuntimeError(f"{operation}: backend 'fused' cannot run here: {why_not}")
    return "parallel"
