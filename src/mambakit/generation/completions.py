"""What generation returns, row by row."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mambakit.models import ModelState

from .bookmark import Bookmark
from .engine import Alternatives, Chosen
from .stopping import FinishReason


@dataclass(frozen=True, eq=False)
class Completions:
    """Hold the continuations of a batch of prompts: the samples of each prompt in succession.

    Attributes:
        tokens: The new tokens of each row, with the end token if it ended with one.
        log_probabilities: Of each row's tokens: the logarithm of the probability that the model
            gives them, among the ids that can be chosen, before processors and rules.
        finish_reasons: Why each row ended: ``"length"``, ``"stop_token"`` or ``"stop_string"``.
        texts: What each row's tokens add to the text before them, without the end token or stop
            string; ``None`` where there was no tokenizer.
        alternatives: The likeliest tokens at each place of each row; ``None`` if not asked for.
        bookmark: Where each row was left, to go on from there.
        scores: What beam search ranks by; ``None`` otherwise.
        acceptance: The share of the draft model's tokens that was accepted; ``None`` where
            there was no draft, or it had nothing to propose.
    """

    tokens: tuple[Int[Tensor, " _"], ...]
    log_probabilities: tuple[Float[Tensor, " _"], ...]
    finish_reasons: tuple[FinishReason, ...]
    texts: tuple[str, ...] | None
    alternatives: tuple[Alternatives, ...] | None
    bookmark: Bookmark
    scores: tuple[float, ...] | None = None
    acceptance: float | None = None

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.tokens)

    @property
    def state(self) -> ModelState:
        """What each row has read: all of its tokens but the last."""
        return self.bookmark.state


@dataclass(frozen=True, eq=False)
class Columns:
    """Steps sorted into rows."""

    tokens: tuple[Tensor, ...]
    log_probabilities: tuple[Tensor, ...]
    alternatives: tuple[Alternatives, ...] | None


def by_row(
    steps: Sequence[Chosen], rows: int, alternatives: int, device: torch.device
) -> Columns:
    """Sort what steps chose into rows."""
    every = [row for each in steps for row in each.rows]
    owner = torch.tensor(every, dtype=torch.int64, device="cpu")
    # stable, so that each row's tokens stay in order
    order = owner.argsort(stable=True).to(device)
    counts = owner.bincount(minlength=rows).tolist()

    def split(parts: Sequence[Tensor], empty: Tensor) -> tuple[Tensor, ...]:
        return torch.cat([empty, *parts])[order].split(counts)

    whole, real = torch.int64, torch.float32
    best = [each.alternatives for each in steps if each.alternatives is not None]
    more = None
    if alternatives:
        shape = (0, alternatives)
        ids = split([a.tokens for a in best], torch.empty(shape, dtype=whole, device=device))
        logs = split([a.log_probabilities for a in best], torch.empty(shape, device=device))
        more = tuple(map(Alternatives, ids, logs))
    scores = [each.log_probabilities for each in steps if each.log_probabilities is not None]
    return Columns(
        split([each.tokens for each in steps], torch.empty(0, dtype=whole, device=device)),
        split(scores, torch.empty(0, dtype=real, device=device)),
        more,
    )


def gather_states(groups: Sequence[tuple[list[int], ModelState]]) -> ModelState:
    """Put the states of groups of rows in the order of the rows."""
    order = [row for rows, _ in groups for row in rows]
    at = sorted(range(len(order)), key=order.__getitem__)
    # also of a single group a copy: what inference mode made, no gradient could go through
    whole = ModelState.cat([state for _, state in groups])
    return whole if at == list(range(len(at))) else whole[at]
