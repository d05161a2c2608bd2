"""One token on a GPU at the speed of its memory: fused kernels in a CUDA graph."""

from .step import GPUStep, refusal

__all__ = ["GPUStep", "refusal"]
