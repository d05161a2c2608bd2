"""Checks at the door of a module: the sizes it is made of, and what it is called with.

As in the operations, a message is built only when a check fails. The widths that ``x`` is
compared with are plain numbers, so that a compiler finds nothing here to guard but its rank.
"""

import math
from numbers import Integral, Real

import torch
from torch import Tensor, nn

from mambakit.ops._shapes import FLOATS, check_floats

from ._plain import is_plain
from .linear import Linear, autocasts


def check_size(module: str, name: str, value: object) -> None:
    """Check that a size is a whole number of at least 1.

    Raises:
        ValueError: It is something else.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise ValueError(
            f"{module}: {name} must be a whole number of at least 1, got {value!r}"
        )


def check_positive(module: str, name: str, value: object) -> None:
    """Check that a value is a finite number above 0.

    Raises:
        ValueError: It is something else.
    """
    number = isinstance(value, Real) and not isinstance(value, bool)
    if not number or not 0 < value < math.inf:  # type: ignore[operator]
        raise ValueError(f"{module}: {name} must be a positive, finite number, got {value!r}")


def check_input(
    module: str, x: Tensor, width: int, layer: nn.Module, kind: type[nn.Module]
) -> None:
    """Check what a module of some width is called with, whose ``layer`` takes it first.

    It must be where the layer's weight is and, for a ``Linear``, of its dtype or under
    autocast. A layer that is not as it was made, a hooked one or an adapter, may move and
    convert what it takes, or its weight.

    Raises:
        ValueError: It is no dense tensor of floats of shape (b, l, width), or what the layer
            would refuse.
    """
    check_stream(module, "x", x, width)
    weight = layer._parameters.get("weight")
    if weight is None or (x.device == weight.device and x.dtype == weight.dtype):
        return
    if not is_plain(layer, kind):
        return
    if x.device != weight.device:
        raise ValueError(
            f"{module}: x must be on {weight.device} like the parameters, got {x.device}"
        )
    # autocast leaves float64 as it is
    double = torch.float64 in (x.dtype, weight.dtype)
    if kind is Linear and (double or not autocasts(x.device.type)):
        raise ValueError(
            f"{module}: x must be {_name(weight.dtype)} like the parameters, "
            f"got {_name(x.dtype)}{'' if double else ' without autocast'}"
        )


def check_stream(module: str, name: str, x: Tensor, width: int) -> None:
    """Check what a module is called with, or what a part of it gave.

    Raises:
        ValueError: It is no dense tensor of floats of shape (b, l, width).
    """
    if _is_dense(x) and x.ndim == 3 and x.shape[2] == width:
        return
    check_floats(module, name, **{name: x})
    raise ValueError(f"{module}: {name} must have shape (b, l, {width}), got {tuple(x.shape)}")


def check_vectors(module: str, x: Tensor, weight: Tensor) -> None:
    """Check what a module is called with that takes vectors of its weight's width, any number.

    Raises:
        ValueError: It is no dense tensor of floats of shape (..., m) where ``weight`` is.
    """
    if _is_dense(x) and x.shape[-1:] == weight.shape and x.device == weight.device:
        return
    check_floats(module, "x", x=x)
    if x.shape[-1:] != weight.shape:
        raise ValueError(
            f"{module}: x must have shape (..., {weight.shape[0]}), got {tuple(x.shape)}"
        )
    raise ValueError(
        f"{module}: x must be on {weight.device} like the parameters, got {x.device}"
    )


def check_part(
    module: str, name: str, part: Tensor, sizes: tuple[int, int, int], x: Tensor
) -> None:
    """Check one part of the state that comes with ``x``.

    Raises:
        ValueError: It is no dense tensor of floats of these sizes where ``x`` is.
    """
    if _is_dense(part) and part.shape == sizes and part.device == x.device:
        return
    full = f"state.{name}"
    check_floats(module, full, **{"x": x, full: part})
    raise ValueError(
        f"{module}: state must have {name} of shape {sizes}, got {tuple(part.shape)}"
    )


def _is_dense(x: object) -> bool:
    """Say in a microsecond what ``check_floats`` says in several, or in a sentence."""
    return (
        isinstance(x, Tensor)
        and x.dtype in FLOATS
        and x.layout is torch.strided
        and not x.is_nested
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
