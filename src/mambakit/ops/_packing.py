"""Sequences of several lengths in one call: laid end to end, or padded and brought to that.

The kernels know one form, the pack: sequences lie end to end along the axis of time, in a batch
of 1, and ``cu_seqlens`` holds where each begins and where the last one ends.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Int, Integer, Shaped
from torch import Tensor

# What an attention mask may be stored as.
_INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class Packing(NamedTuple):
    """How the rows of a padded batch become one pack, and how they come back.

    ``cu_seqlens`` is int64 on the CPU. ``places`` holds, for each token of the pack, its place
    in the batch flattened over rows and time, on the device of the batch, whose shape is
    (``rows``, ``steps``).
    """

    cu_seqlens: Int[Tensor, " bounds"]
    places: Int[Tensor, " total"]
    rows: int
    steps: int

    def pack(self, batch: Shaped[Tensor, "b l *rest"]) -> Shaped[Tensor, "1 total *rest"]:
        """Lay the tokens of the rows end to end and leave the padding out."""
        return batch.flatten(0, 1).index_select(0, self.places)[None]

    def unpack(self, packed: Shaped[Tensor, "1 total *rest"]) -> Shaped[Tensor, "b l *rest"]:
        """Put the tokens back into their rows, with zeros at the padding."""
        rest = packed.shape[2:]
        batch = packed.new_zeros(self.rows * self.steps, *rest)
        return batch.index_copy(0, self.places, packed[0]).view(self.rows, self.steps, *rest)


def arrange(
    operation: str,
    b: int,
    l: int,
    device: torch.device,
    cu_seqlens: Int[Tensor, " bounds"] | None,
    lengths: Int[Tensor, " b"] | None,
    attention_mask: Bool[Tensor, "b l"] | Integer[Tensor, "b l"] | None,
) -> tuple[Int[Tensor, " bounds"] | None, Packing | None]:
    """Check how the sequences of a (b, l) batch are told apart, and bring it to one form.

    Returns:
        ``cu_seqlens`` as the kernels take it, or ``None`` where each row of the batch is one
        sequence; and, where rows are padded, the packing that ``cu_seqlens`` is of. A mask or
        lengths that leave nothing out are no packing. The values of the caller's own
        ``cu_seqlens`` are not looked at: ``bounds`` is for that.

    Raises:
        ValueError: More than one of the three is given, or one of them is not as it must be.
    """
    if cu_seqlens is None and lengths is None and attention_mask is None:
        return None, None
    given = {"cu_seqlens": cu_seqlens, "lengths": lengths, "attention_mask": attention_mask}
    names = [name for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise ValueError(
            f"{operation}: {names[1]} must be None where {names[0]} is given, got both"
        )
    if cu_seqlens is not None:
        return _canonical(operation, cu_seqlens, b), None
    if lengths is not None:
        real = _of_lengths(operation, lengths, b, l)
    elif attention_mask is not None:
        real = _of_mask(operation, attention_mask, b, l)
    if bool(real.all()):
        return None, None
    ends = real.sum(1).cumsum(0)
    index = real.flatten().nonzero().flatten()
    packing = Packing(torch.cat([ends.new_zeros(1), ends]), index.to(device), b, l)
    return packing.cu_seqlens, packing


def bounds(operation: str, cu_seqlens: Int[Tensor, " bounds"], l: int) -> list[int]:
    """Return where each sequence of a pack of ``l`` steps begins, and where the last one ends.

    Raises:
        ValueError: The values of ``cu_seqlens`` do not rise from 0 to ``l``.
    """
    ends: list[int] = cu_seqlens.tolist()
    if ends[0] != 0:
        raise ValueError(f"{operation}: cu_seqlens must start at 0, got {ends[0]}")
    if not bool((cu_seqlens[1:] > cu_seqlens[:-1]).all()):
        k = next(k for k in range(1, len(ends)) if ends[k] <= ends[k - 1])
        raise ValueError(
            f"{operation}: cu_seqlens must rise, got {ends[k]} after {ends[k - 1]} at index {k}"
        )
    if ends[-1] != l:
        raise ValueError(f"{operation}: cu_seqlens must end at l={l}, got {ends[-1]}")
    return ends


def kept_for_backward(cu_seqlens: Tensor | None) -> Tensor | None:
    """Return a copy that nobody else writes to.

    The backward pass reads the values again. NumPy may share the caller's memory, and what is
    written there by then would not be noticed.
    """
    return None if cu_seqlens is None else cu_seqlens.clone()


def _canonical(operation: str, cu_seqlens: Tensor, b: int) -> Tensor:
    """Check all of ``cu_seqlens`` but its values; bring it to int64 on the CPU."""
    _check_tensor(operation, "cu_seqlens", cu_seqlens)
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"{operation}: cu_seqlens must be int32 or int64, got {_name(cu_seqlens.dtype)}"
        )
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(
            f"{operation}: cu_seqlens must have shape (s+1) with at least one sequence, "
            f"got {tuple(cu_seqlens.shape)}"
        )
    if b != 1:
        raise ValueError(
            f"{operation}: cu_seqlens must come with b=1, one row that holds every sequence, "
            f"got b={b}"
        )
    return cu_seqlens.to("cpu", torch.int64).contiguous()


def _of_lengths(operation: str, lengths: Tensor, b: int, l: int) -> Tensor:
    """Say which steps are tokens, (b, l) on the CPU."""
    _check_tensor(operation, "lengths", lengths)
    if lengths.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"{operation}: lengths must be int32 or int64, got {_name(lengths.dtype)}"
        )
    if lengths.shape != (b,):
        raise ValueError(
            f"{operation}: lengths must have shape (b={b}), got {tuple(lengths.shape)}"
        )
    lengths = lengths.cpu()
    wrong = (lengths < 1) | (lengths > l)
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"{operation}: lengths must lie between 1 and l={l}, got {int(lengths[row])} "
            f"in row {row}"
        )
    return torch.arange(l, device="cpu") < lengths[:, None]


def _of_mask(operation: str, attention_mask: Tensor, b: int, l: int) -> Tensor:
    """Say which steps are tokens, (b, l) on the CPU."""
    _check_tensor(operation, "attention_mask", attention_mask)
    if attention_mask.dtype not in _INTEGERS:
        raise ValueError(
            f"{operation}: attention_mask must be bool or of integers, "
            f"got {_name(attention_mask.dtype)}"
        )
    if attention_mask.shape != (b, l):
        raise ValueError(
            f"{operation}: attention_mask must have shape (b={b}, l={l}), "
            f"got {tuple(attention_mask.shape)}"
        )
    values = attention_mask.cpu()
    real = values != 0
    other = real & (values != 1)
    if bool(other.any()):
        row, step = other.nonzero()[0].tolist()
        raise ValueError(
            f"{operation}: attention_mask must hold 0 and 1 alone, "
            f"got {int(values[row, step])} in row {row}"
        )
    # a run of ones begins where a one has none before it
    runs = real[:, :1].sum(1) + (real[:, 1:] & ~real[:, :-1]).sum(1)
    if bool((runs != 1).any()):
        row = int((runs != 1).nonzero()[0])
        got = "no one" if runs[row] == 0 else f"{int(runs[row])} runs"
        raise ValueError(
            f"{operation}: attention_mask must have one run of ones in each row, "
            f"got {got} in row {row}"
        )
    return real


def _check_tensor(operation: str, name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise ValueError(f"{operation}: {name} must be a tensor, got {type(value).__name__}")
    if value.is_nested or value.layout is not torch.strided:
        layout = str(value.layout).removeprefix("torch.")
        got = "a nested one" if value.is_nested else f"layout {layout}"
        raise ValueError(f"{operation}: {name} must be a dense tensor, got {got}")
    if value.device.type == "meta":
        raise ValueError(f"{operation}: {name} must have values, got a tensor on meta")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
