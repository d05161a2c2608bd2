"""What holds for single parameters: no weight decay, and never less than float32."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


def exempt_from_decay(*parameters: Tensor | None) -> None:
    """Mark parameters that weight decay must leave alone; ``None`` is passed over.

    The mark is the attribute ``_no_weight_decay``, as on the published models' parameters.
    """
    for parameter in parameters:
        if parameter is not None:
            parameter._no_weight_decay = True  # type: ignore[attr-defined]


def at_least_float32(
    fn: Callable[[Tensor], Tensor], parameters: tuple[nn.Parameter, ...]
) -> Callable[[Tensor], Tensor]:
    """Change what ``module._apply(fn)`` does to some parameters: they keep at least float32.

    ``module.to(torch.bfloat16)`` and ``module.half()`` reach every parameter through
    ``_apply``. Of A, D and the step's bias they would leave 8 or 11 bits, and a decay
    ``exp(dt A)`` close to 1, raised to the power of the sequence's length, needs more.
    """
    kept = {id(parameter) for parameter in parameters}
    kept |= {id(parameter.grad) for parameter in parameters if parameter.grad is not None}

    def apply(tensor: Tensor) -> Tensor:
        result = fn(tensor)
        if id(tensor) not in kept:
            return result
        wanted = torch.promote_types(result.dtype, torch.float32)
        return result if result.dtype == wanted else tensor.to(result.device, wanted)

    return apply
