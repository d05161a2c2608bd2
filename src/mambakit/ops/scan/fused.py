"""The selective scan by compiled kernels: ``torch.ops.mambakit.selective_scan``."""

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import _cuda
from .._backends import fused_kernels
from . import cpu, registration
from .cuda import backward as cuda_backward, forward as cuda_forward
from .cuda.operands import CHECKPOINT_STEPS
from .registration import Kernels, register


def _steps_on_gpu(
    device: torch.device, dtype: torch.dtype, sizes: Sequence[int], packed: bool
) -> int:
    if fused_kernels("selective_scan", device).kind != "cuda":
        return CHECKPOINT_STEPS
    room, _ = _cuda.shared_memory(device.index)
    return cuda_backward.steps_to_save(*sizes, dtype=dtype, packed=packed, block_bytes=room)


def _forward_on_gpu(x: Tensor, *rest: Any, **more: Any) -> tuple[Tensor, Tensor, Tensor]:
    if _by_triton(x):
        return _triton().forward(x, *rest, **more)
    return cuda_forward.forward(x, *rest, **more)


def _backward_on_gpu(
    dy: Tensor, *rest: Any, dgate: Tensor | None = None, cu_seqlens: Tensor | None
) -> registration.Gradients:
    if _by_triton(dy):
        return _triton().backward(dy, *rest, cu_seqlens=cu_seqlens)
    return cuda_backward.backward(dy, *rest, dgate=dgate, cu_seqlens=cu_seqlens)


def _by_triton(tensor: Tensor) -> bool:
    return fused_kernels("selective_scan", tensor.device).kind == "triton"


def _triton() -> ModuleType:
    # it is not there without Triton, and takes seconds to import
    from . import triton

    return triton


_ON_GPU = Kernels(
    _forward_on_gpu,
    _backward_on_gpu,
    CHECKPOINT_STEPS,
    takes_dgate=True,
    steps_for=_steps_on_gpu,
)
_KERNELS = {
    "CPU": Kernels(cpu.forward, cpu.backward, cpu.TILE_STEPS),
    "CUDA": _ON_GPU,  # the name that AMD's go by too
    "XPU": _ON_GPU,
}

scan = register("selective_scan", _KERNELS)


def checkpoint_steps(device: torch.device) -> int:
    """Return the steps that a call on ``device`` names if it saves no states."""
    return registration.checkpoint_steps(_KERNELS, device)


def steps_to_save(x: Tensor, sizes: Sequence[int], packed: bool) -> int:
    """Return the steps between two states to be saved, of a scan of sizes b, l, d and n.

    ``x`` is any tensor of its dtype, where it lies.
    """
    return registration.steps_to_save(_KERNELS, x, sizes, packed)
