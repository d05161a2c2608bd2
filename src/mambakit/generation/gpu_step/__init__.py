"""One token on a GPU at the speed of its memory: fused kernels in a CUDA graph."""

from .packing import Weights
from .step import GPUStep, refusal

__all__ = ["GPUStep", "Weights", "refusal"]
