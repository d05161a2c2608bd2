"""How a module's input is brought to the one form in which sequences share a call: the pack."""

from jaxtyping import Bool, Float, Int, Integer
from torch import Tensor

from mambakit.ops._packing import Packing, arrange


def to_pack(
    operation: str,
    x: Float[Tensor, "b l m"],
    cu_seqlens: Int[Tensor, " bounds"] | None,
    lengths: Int[Tensor, " b"] | None,
    attention_mask: Bool[Tensor, "b l"] | Integer[Tensor, "b l"] | None,
) -> tuple[Float[Tensor, "rows steps m"], Int[Tensor, " bounds"] | None, Packing | None]:
    """Return ``x`` without padding, ``cu_seqlens`` of what it is then, and the way back.

    All three keywords ``None``, which is every day, leave ``x`` as it is.

    Raises:
        ValueError: More than one of the three is given, or one of them is not as it must be;
            the values of ``cu_seqlens`` are left to the operations.
    """
    if cu_seqlens is None and lengths is None and attention_mask is None:
        return x, None, None
    b, l, _ = x.shape
    cu_seqlens, packing = arrange(
        operation, b, l, x.device, cu_seqlens, lengths, attention_mask
    )
    return (x if packing is None else packing.pack(x)), cu_seqlens, packing
