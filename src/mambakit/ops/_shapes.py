"""Checks at the door of an operation: what its tensors are, and that their axes agree.

A message is built only when a check fails: under ``torch.compile`` the text of a symbolic size
would fix it to one number, and every new length would be compiled anew.
"""

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_axes(operation: str, /, **tensors: tuple[Tensor | None, str]) -> dict[str, int]:
    """Bind each axis letter to a size and return the sizes.

    Each keyword is ``name=(tensor, "b l d")``, its axes single letters with a space between
    two; a tensor that is ``None`` is passed over.

    Raises:
        ValueError: A tensor has another number of axes, or a letter would have two sizes.
    """
    sizes: dict[str, int] = {}
    for name, (tensor, axes) in tensors.items():
        if tensor is None:
            continue
        shape, letters = tensor.shape, axes[::2]
        fits = len(shape) == len(letters)
        if fits:
            for letter, size in zip(letters, shape, strict=True):
                if sizes.setdefault(letter, size) != size:
                    fits = False
                    break
        if not fits:
            wanted = ", ".join(f"{a}={sizes[a]}" if a in sizes else a for a in letters)
            raise ValueError(
                f"{operation}: {name} must have shape ({wanted}), got {tuple(shape)}"
            )
    return sizes


def check_floats(operation: str, /, *needed: str, **tensors: Tensor | None) -> None:
    """Check that the tensors are dense, of real floating dtypes and all on one device.

    A keyword is ``name=tensor``; the first names the device, and ``None`` is passed over
    unless the tensor is one of those ``needed``.

    Raises:
        ValueError: One of them is something else.
    """
    device = None
    for name, tensor in tensors.items():
        if tensor is None and name not in needed:
            continue
        if not isinstance(tensor, Tensor):
            got = "None" if tensor is None else type(tensor).__name__
            raise ValueError(f"{operation}: {name} must be a tensor, got {got}")
        if tensor.dtype not in FLOATS:
            raise ValueError(
                f"{operation}: {name} must be float32, bfloat16, float16 or float64, "
                f"got {str(tensor.dtype).removeprefix('torch.')}"
            )
        if tensor.layout is not torch.strided or tensor.is_nested:
            layout = str(tensor.layout).removeprefix("torch.")
            got = "a nested one" if tensor.is_nested else f"layout {layout}"
            raise ValueError(f"{operation}: {name} must be a dense tensor, got {got}")
        if device is None:
            device = tensor.device
        elif tensor.device != device:
            raise ValueError(
                f"{operation}: {name} must be on {device} like the others, got {tensor.device}"
            )
