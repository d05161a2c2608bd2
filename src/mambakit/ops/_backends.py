"""Which implementation of an operation runs: the one named, or the best for the device."""

from typing import Literal, get_args

import torch

from . import _native

Backend = Literal["auto", "reference", "parallel", "fused"]
Implementation = Literal["reference", "parallel", "fused"]

BACKENDS: tuple[str, ...] = get_args(Backend)

# Why a device has no fused kernels; None where it has them. Asked once, at import: loading a
# library is nothing that torch.compile could trace, a look into a dictionary is.
MISSING: dict[str, str | None] = {"cpu": _native.unavailable()}


def why_not_fused(device: torch.device) -> str | None:
    """Say why the fused kernels cannot run on ``device``, or ``None`` if they can."""
    return MISSING.get(device.type, f"there is no fused kernel for {device.type} tensors")


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
    why = why_not_fused(device)
    if why is None:
        return "fused"
    if backend == "fused":
        raise RuntimeError(f"{operation}: backend 'fused' cannot run here: {why}")
    return "parallel"
