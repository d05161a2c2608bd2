"""The gradient of one batch, of whole rows at once or chunk by chunk."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mambakit.models import MambaLM, ModelState
from mambakit.models.documents import pack_documents

from .compilation import let_rows_vary
from .loss import count_targets, linear_cross_entropy


def add_gradients(
    model: MambaLM,
    tokens: Int[Tensor, "b l"],
    targets: Int[Tensor, "b l"],
    state: ModelState | None,
    *,
    starts: Bool[Tensor, "b l"] | None = None,
    autocast: Callable[[], AbstractContextManager],
    chunk: int | None = None,
    share: float = 1.0,
    compiled: bool = False,
) -> tuple[Float[Tensor, ""], ModelState]:
    """Add the loss's gradients to those of the parameters; return the loss and the state after.

    In chunks the sums are the same, and only a chunk is in memory. What lies before a chunk is
    known to it by the state there, and hears of it by that state's gradient: the states are
    computed first, then each chunk with its gradients, from the last one back.

    Args:
        model: The language model.
        tokens: What it reads.
        targets: What comes after each of them; negative where nothing is wanted.
        state: What came before the tokens; it gets no gradient.
        starts: Which tokens begin a document, which is read from no state; on the CPU. ``None``
            means none does.
        autocast: Makes the context of the forward pass.
        chunk: Steps that are in memory at once, a divisor of l; ``None`` means all.
        share: Factor of the gradients: that of this batch in an average over several.
        compiled: Whether the model's blocks are compiled; and as in ``linear_cross_entropy``.

    Returns:
        The mean loss in nats over the targets that are wanted, and the state after the last
        token; neither has a graph.

    Example:
        >>> from contextlib import nullcontext
        >>> from mambakit import MambaConfig
        >>> model = MambaLM(MambaConfig(d_model=16, n_layer=2, vocab_size=32))
        >>> tokens, targets = torch.randint(32, (2, 1, 8))
        >>> gradients = []
        >>> for chunk in (None, 2):
        ...     _ = add_gradients(
        ...         model, tokens, targets, None, autocast=nullcontext, chunk=chunk
        ...     )
        ...     gradients.append([p.grad for p in model.parameters()])
        ...     model.zero_grad()
        >>> torch.testing.assert_close(*gradients)
    """
    l = tokens.shape[1]
    size = chunk or l
    pieces = list(zip(tokens.split(size, 1), targets.split(size, 1), strict=True))
    cuts = [None] * len(pieces) if starts is None else list(starts.split(size, 1))
    count = count_targets(targets)
    before = [state]
    with torch.no_grad(), autocast():
        for (piece, _), cut in zip(pieces[:-1], cuts, strict=False):
            before.append(_read(model, piece, cut, before[-1], compiled)[1])

    total = torch.zeros((), device=tokens.device)
    last: ModelState | None = None
    after: list[Tensor | None] = []  # gradients to the state behind the chunk in hand
    while pieces:
        (piece, wanted), cut, start = pieces.pop(), cuts.pop(), before.pop()
        leaves = [] if start is None or not pieces else _tensors(start)
        for leaf in leaves:
            leaf.requires_grad_()
        with autocast():
            x, end = _read(model, piece, cut, start, compiled)
            loss = linear_cross_entropy(x, model.lm_head.weight, wanted, compiled=compiled)
        loss = loss * (count_targets(wanted) / count)
        sources: list[Tensor] = [loss * share]
        gradients: list[Tensor | None] = [None]
        for tensor, gradient in zip(_tensors(end), after, strict=False):
            if gradient is not None:
                sources.append(tensor)
                gradients.append(gradient)
        torch.autograd.backward(sources, gradients)
        after = [leaf.grad for leaf in leaves]
        total += loss.detach()
        last = end.detach() if last is None else last
    assert last is not None
    return total, last


def _read(
    model: MambaLM,
    tokens: Tensor,
    starts: Tensor | None,
    state: ModelState | None,
    compiled: bool,
) -> tuple[Tensor, ModelState]:
    """Return the vectors, of rows or of rows end to end, and the state after each row."""
    if starts is None:
        return model.backbone(tokens, state)
    pack = pack_documents(tokens, starts, state)
    if compiled:
        let_rows_vary(pack.cu_seqlens, *(() if pack.state is None else _tensors(pack.state)))
    x, after = model.backbone(pack.tokens, pack.state, cu_seqlens=pack.cu_seqlens)
    return x, after[pack.ends]


def _tensors(state: ModelState) -> list[Tensor]:
    return [tensor for layer in state.layers for tensor in layer]
