"""The gradient of one batch, of whole rows at once or chunk by chunk."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mambakit.models import MambaLM, ModelState

from .loss import linear_cross_entropy


def add_gradients(
    model: MambaLM,
    tokens: Int[Tensor, "b l"],
    targets: Int[Tensor, "b l"],
    state: ModelState | None,
    *,
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
        targets: What comes after each of them.
        state: What came before the tokens; it gets no gradient.
        autocast: Makes the context of the forward pass.
        chunk: Steps that are in memory at once, a divisor of l; ``None`` means all.
        share: Factor of the gradients: that of this batch in an average over several.
        compiled: As in ``linear_cross_entropy``.

    Returns:
        The mean loss in nats, and the state after the last token; neither has a graph.

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
    pieces = list(zip(tokens.split(chunk or l, 1), targets.split(chunk or l, 1), strict=True))
    before = [state]
    with torch.no_grad(), autocast():
        for piece, _ in pieces[:-1]:
            before.append(model.backbone(piece, before[-1])[1])

    total = torch.zeros((), device=tokens.device)
    last: ModelState | None = None
    after: list[Tensor | None] = []  # gradients to the state behind the chunk in hand
    while pieces:
        (piece, wanted), start = pieces.pop(), before.pop()
        leaves = [] if start is None or not pieces else _tensors(start)
        for leaf in leaves:
            leaf.requires_grad_()
        with autocast():
            x, end = model.backbone(piece, start)
            loss = linear_cross_entropy(x, model.lm_head.weight, wanted, compiled=compiled)
        loss = loss * (piece.shape[1] / l)
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


def _tensors(state: ModelState) -> list[Tensor]:
    return [tensor for layer in state.layers for tensor in layer]
