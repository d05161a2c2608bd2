"""One token on a CPU at the speed of its memory, with weights as they are or rounded."""

from .packing import Weights, rounded
from .step import CPUStep, StepOutput, refusal

__all__ = ["CPUStep", "StepOutput", "Weights", "refusal", "rounded"]
