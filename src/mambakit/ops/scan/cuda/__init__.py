"""The selective scan as CUDA kernels."""
