"""One layer of the stack: normalise, mix along time, add to the residual stream."""

import torch
from jaxtyping import Bool, Float, Int, Integer
from torch import Tensor, nn

from ._checks import check_input, check_size
from ._sequences import to_pack
from .mamba import Mamba, MixerState
from .norm import RMSNorm


class Block(nn.Module):
    """Add to the residual stream what the mixer makes of its normalised copy.

        y = x + mixer(norm(x))

    Args:
        mixer: Maps ``(x, state, cu_seqlens=...)`` to ``(y, state)`` at width ``m``.
        m: Width of the stream.
        norm_eps: ``eps`` of the RMSNorm.
        device: Where the norm's gain is made.
        dtype: Dtype of the norm's gain; ``None`` means torch's default.

    ``y`` has the dtype that ``x`` and the mixer's output promote to: a float32 stream stays
    float32 whatever the mixer computes in.

    Raises:
        ValueError: ``m`` is no whole number of at least 1, or ``norm_eps`` is negative.

    Source: Gu and Dao, "Mamba", 2023, figure 3 and section 3.4.

    Example:
        >>> block = Block(Mamba(16), 16)
        >>> x = torch.randn(2, 5, 16)
        >>> y, state = block(x)
        >>> torch.testing.assert_close(y, x + block.mixer(block.norm(x))[0])
    """

    def __init__(
        self,
        mixer: Mamba,
        m: int,
        *,
        norm_eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_size("Block", "m", m)
        self.m = m
        self.norm = RMSNorm(m, norm_eps, device=device, dtype=dtype)
        self.mixer = mixer

    def forward(
        self,
        x: Float[Tensor, "b l m"],
        state: MixerState | None = None,
        *,
        cu_seqlens: Int[Tensor, " bounds"] | None = None,
        lengths: Int[Tensor, " b"] | None = None,
        attention_mask: Bool[Tensor, "b l"] | Integer[Tensor, "b l"] | None = None,
    ) -> tuple[Float[Tensor, "b l m"], MixerState]:
        """Return the stream after this layer, and the state; ``None`` begins a sequence.

        The keywords tell sequences apart as in ``Mamba``; at padding the stream becomes 0.

        Raises:
            ValueError: ``x`` is no tensor of floats of shape (b, l, m) where the parameters
                are, or the mixer refuses ``state`` or a keyword.
            RuntimeError: The mixer's backend cannot run on the device of ``x``.
        """
        norm = self.norm
        check_input("Block", x, self.m, norm, RMSNorm)
        x, cu_seqlens, packing = to_pack("Block", x, cu_seqlens, lengths, attention_mask)
        y, state = self.mixer(norm(x), state, cu_seqlens=cu_seqlens)
        x = x + y
        return (x if packing is None else packing.unpack(x)), state
