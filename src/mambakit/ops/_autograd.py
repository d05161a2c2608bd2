"""What a registered operator asks of its arguments before autograd may be left behind."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def any_requires_grad(arguments: Iterable[Any]) -> bool:
    """Say whether a tensor among the arguments takes part in reverse-mode differentiation."""
    for argument in arguments:  # a loop, for a generator takes twice as long
        if isinstance(argument, Tensor) and argument.requires_grad:
            return True
    return False


def refuse_tangents(operation: str, arguments: Iterable[Any]) -> None:
    """Check that no argument carries a tangent: a kernel would drop it, which reads as zero.

    Raises:
        RuntimeError: One of them does.
    """
    if forward_ad._current_level < 0:  # nobody differentiates forward, which is every day
        return
    for argument in arguments:
        if (
            isinstance(argument, Tensor)
            and forward_ad.unpack_dual(argument).tangent is not None
        ):
            raise RuntimeError(
                f"{operation}: forward-mode derivatives exist only with backend='reference'"
            )


def refuse_transforms(operation: str) -> None:
    """Check, before an ``autograd.Function`` is applied, that ``torch.func`` asks for nothing.

    ``torch.func.vmap`` of a call that nobody differentiates never comes here.

    Raises:
        RuntimeError: ``torch.func`` differentiates; PyTorch's own words would speak of a
            method that the Function lacks.
    """
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            f"{operation}: derivatives by torch.func exist only with backend='reference'"
        )
