"""Rows of text in which documents begin, laid end to end so that each starts from no state."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mambakit.modules import MixerState

from .state import ModelState


class Pack(NamedTuple):
    """What a model is called with: ``model(pack.tokens, pack.state, cu_seqlens=...)``.

    Attributes:
        tokens: The rows, end to end.
        cu_seqlens: Where each sequence begins and, last, where the last ends; on the CPU. A
            sequence is a document, or the part of one that lies in a row.
        state: What came before each sequence; ``None`` where nothing came before any.
        ends: The number of each row's last sequence: ``state_after[ends]`` is what goes on.
    """

    tokens: Int[Tensor, "1 bl"]
    cu_seqlens: Int[Tensor, " bounds"]
    state: ModelState | None
    ends: Int[Tensor, " b"]


def pack_documents(
    tokens: Int[Tensor, "b l"], starts: Bool[Tensor, "b l"], state: ModelState | None = None
) -> Pack:
    """Lay rows end to end and cut them where a document begins.

    Args:
        tokens: The rows, with ``l`` at least 1.
        starts: Which tokens are the first of a document. On the CPU, for the cuts are known
            there; elsewhere it is copied.
        state: What came before each row. A row that begins with a document forgets it.

    Raises:
        ValueError: ``starts`` is not bool or not of the shape of ``tokens``, there is no token
            in a row, or ``state`` is of another number of sequences than there are rows.

    Example:
        >>> from mambakit import MambaConfig, MambaLM
        >>> model = MambaLM(MambaConfig(d_model=16, n_layer=1, vocab_size=32))
        >>> rows = torch.randint(32, (2, 5))
        >>> starts = torch.zeros(2, 5, dtype=torch.bool)
        >>> starts[0, 3] = True
        >>> tokens, cu_seqlens, state, ends = pack_documents(rows, starts)
        >>> cu_seqlens.tolist(), ends.tolist()
        ([0, 3, 5, 10], [1, 2])
        >>> logits = model(tokens, state, cu_seqlens=cu_seqlens).logits.view(2, 5, 32)
        >>> torch.testing.assert_close(logits[:1, 3:], model(rows[:1, 3:]).logits)
    """
    if tokens.ndim != 2 or tokens.shape[1] < 1:
        raise ValueError(
            "pack_documents: tokens must have shape (b, l) with l at least 1, "
            f"got {tuple(tokens.shape)}"
        )
    if starts.dtype != torch.bool or starts.shape != tokens.shape:
        raise ValueError(
            "pack_documents: starts must be bool of the shape "
            f"{tuple(tokens.shape)} of tokens, got "
            f"{str(starts.dtype).removeprefix('torch.')} of {tuple(starts.shape)}"
        )
    if state is not None and len(state) != len(tokens):
        raise ValueError(
            f"pack_documents: state must hold one sequence for each row, {len(tokens)}, "
            f"got {len(state)}"
        )
    starts = starts.cpu()
    begins = starts.clone()
    begins[:, 0] = True
    places = begins.flatten().nonzero()[:, 0]
    ends = begins.sum(1).cumsum(0) - 1
    cu_seqlens = torch.cat([places, places.new_tensor([starts.numel()])])
    if state is not None:
        going_on = (~starts[:, 0]).nonzero()[:, 0]
        firsts = ends - begins.sum(1) + 1
        state = _spread(state, len(places), firsts[going_on], going_on)
    return Pack(tokens.reshape(1, -1), cu_seqlens, state, ends)


def _spread(state: ModelState, count: int, places: Tensor, rows: Tensor) -> ModelState | None:
    """Put some rows of a state in their places among ``count`` sequences that begin anew."""
    if not len(rows):
        return None
    nothing = ModelState(
        tuple(
            MixerState(*(part.new_zeros(count, *part.shape[1:]) for part in layer))
            for layer in state.layers
        )
    )
    return nothing.with_rows(places, state[rows])
