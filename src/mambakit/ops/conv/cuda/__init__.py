"""The causal convolution as CUDA kernels."""

from .launch import backward as backward, forward as forward
