"""The selective scan by compiled kernels: ``torch.ops.mambakit.selective_scan``."""

from . import cpu
from .registration import register

scan = register(
    "selective_scan",
    {"CPU": (cpu.forward, cpu.backward)},
    checkpoint_shape=cpu.checkpoint_shape,
)
