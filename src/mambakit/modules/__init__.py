"""Operations with parameters: ``forward(x, state) -> (y, state)``, and nothing is hidden."""

from .block import Block
from .linear import Linear
from .mamba import Mamba, MixerState, StepProjection
from .norm import RMSNorm

__all__ = ["Block", "Linear", "Mamba", "MixerState", "RMSNorm", "StepProjection"]
