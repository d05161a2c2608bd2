"""Beam search: the most probable continuations, as far as a beam of fixed width sees."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Real

import torch
from jaxtyping import Int
from torch import Tensor

from mambakit.data import Tokenizer
from mambakit.models import MambaLM, ModelState

from .bookmark import Bookmark
from .completions import Completions
from .cpu_step import Weights
from .engine import LogitsProcessor, Plan, require_scored, unscored
from .prompts import Rows, as_rows, begin, read
from .sampling import SamplingRules, exact_device, is_whole
from .settings import (
    already_written,
    begin_texts,
    check_count,
    check_model,
    check_tokenizer,
    check_weights,
    checked_processors,
    choosable,
    last_tokens,
)
from .stepping import Step, stepper
from .stopping import FinishReason, end_tokens
from .text_stream import TextStream

_STEEPEST = 10


def beam_search(
    model: MambaLM,
    prompts: Int[Tensor, "b l"] | Sequence[Int[Tensor, " _"]] | Sequence[str] | None = None,
    *,
    max_new_tokens: int,
    beams: int = 4,
    best: int = 1,
    length_penalty: float = 1.0,
    stop_tokens: Sequence[int] | Sequence[Sequence[int]] = (),
    logits_processors: Sequence[LogitsProcessor] = (),
    vocab_size: int | None = None,
    tokenizer: Tokenizer | None = None,
    state: ModelState | Bookmark | None = None,
    weights: Weights | None = None,
) -> Completions:
    """Find the ``best`` continuations of each prompt by their probability.

        score = (log p_1 + ... + log p_k) / k ** length_penalty,      k new tokens

    At each length the ``beams`` most probable continuations that have not ended are followed,
    and each of them that can end is compared by its score. The search for a prompt is over when
    no continuation can enter the best any more. What is not followed is lost, as is one that
    the processors leave no token for; otherwise the result is exact.

    Args:
        model: The language model.
        prompts: As in ``complete``.
        max_new_tokens: New tokens for each continuation, at most.
        beams: How many continuations are followed at a time.
        best: How many come back for each prompt, in order; at most ``beams``.
        length_penalty: 0 compares sums, which favours short continuations; 1 compares means.
        stop_tokens: As in ``complete``.
        logits_processors: As in ``complete``; the score is made of what they return.
        vocab_size: As in ``complete``.
        tokenizer: As in ``complete``.
        state: As in ``complete``.
        weights: As in ``generate``.

    Returns:
        ``best`` rows for each prompt, best first, with their ``scores``. Fewer only where
        there are not so many.

    Raises:
        ValueError: A setting breaks its rule, a prompt is empty, a token is outside the
            vocabulary, the logits are no numbers, or no continuation of a prompt is left.
        RuntimeError: As ``generate``.

    Example:
        >>> from mambakit import MambaConfig
        >>> model = MambaLM(MambaConfig(d_model=16, n_layer=1, vocab_size=30))
        >>> prompt = torch.tensor([[1, 2, 3]])
        >>> found = beam_search(model, prompt, max_new_tokens=4, beams=5, best=2)
        >>> found.scores[0] >= found.scores[1]
        True
    """
    check_model(model)
    asked = None if prompts is None else as_rows(model, prompts, tokenizer)
    rows, before = begin(model, asked, state)
    check_count("max_new_tokens", max_new_tokens, 1)
    check_count("beams", beams, 1)
    if not is_whole(best) or not 1 <= best <= beams:
        raise ValueError(
            f"generate: best must be a whole number from 1 to beams={beams}, got {best!r}"
        )
    if not isinstance(length_penalty, Real) or not abs(length_penalty) <= _STEEPEST:
        raise ValueError(
            f"generate: length_penalty must be from -{_STEEPEST} to {_STEEPEST}, "
            f"got {length_penalty!r}"
        )
    check_tokenizer(tokenizer)
    check_weights(weights)
    plan = Plan(
        max_new_tokens,
        SamplingRules(temperature=0),
        choosable(model, vocab_size, tokenizer),
        checked_processors(logits_processors),
    )
    # of an id that cannot be chosen there is no score
    ends = [
        frozenset(token for token in each if token < plan.vocab_size)
        for each in end_tokens(model, stop_tokens, len(rows))
    ]
    searches = [
        _Search(row, end, beams, best, length_penalty, max_new_tokens)
        for row, end in zip(rows, ends, strict=True)
    ]
    _run(model, stepper(model, weights), searches, before, plan)
    written = already_written(asked, state, len(rows))
    last, texts = last_tokens(rows, state), None
    if tokenizer is not None:
        texts = begin_texts(tokenizer, [()] * len(rows), prompts, last, written)
    return _collect(searches, texts, last, written)


@dataclass(frozen=True)
class _Beam:
    """A continuation: its tokens, and the sum of their log-probabilities."""

    tokens: tuple[int, ...] = ()
    log_probabilities: tuple[float, ...] = ()

    @property
    def total(self) -> float:
        return sum(self.log_probabilities)


@dataclass
class _Search:
    """The search for one prompt."""

    prompt: Tensor
    ends: frozenset[int]
    width: int
    best: int
    length_penalty: float
    longest: int
    alive: list[_Beam] = field(default_factory=lambda: [_Beam()])
    ended: list[tuple[float, _Beam, FinishReason, ModelState]] = field(default_factory=list)

    def score(self, total: float, length: int) -> float:
        return total / length**self.length_penalty

    def advance(self, log_p: Tensor, state: ModelState) -> list[int]:
        """Extend each beam that is alive; return which beam each new one goes on from."""
        totals = log_p.new_tensor([beam.total for beam in self.alive])
        for token in sorted(self.ends):
            for parent, gain in enumerate(log_p[:, token].tolist()):
                if gain > -torch.inf:
                    self._end(self._extend(parent, token, gain), "stop_token", state, parent)
        log_p = log_p.index_fill(1, self._end_ids(log_p), -torch.inf)
        every = (totals[:, None] + log_p).flatten()
        places = every.topk(min(self.width, len(every))).indices
        gains = log_p.flatten()[places].tolist()
        parents, alive = [], []
        for place, gain in zip(places.tolist(), gains, strict=True):
            if gain > -torch.inf:
                parent, token = divmod(place, log_p.shape[1])
                parents.append(parent)
                alive.append(self._extend(parent, token, gain))
        if alive and len(alive[0].tokens) == self.longest:
            for beam, parent in zip(alive, parents, strict=True):
                self._end(beam, "length", state, parent)
            alive = []
        self.alive = alive
        if not self._may_improve():
            self.alive = []
        return parents if self.alive else []

    def _extend(self, parent: int, token: int, gain: float) -> _Beam:
        old = self.alive[parent]
        return _Beam((*old.tokens, token), (*old.log_probabilities, gain))

    def _end_ids(self, log_p: Tensor) -> Tensor:
        return torch.tensor(sorted(self.ends), dtype=torch.int64, device=log_p.device)

    def _end(self, beam: _Beam, reason: FinishReason, state: ModelState, parent: int) -> None:
        score = self.score(beam.total, len(beam.tokens))
        if len(self.ended) < self.best or score > self.ended[-1][0]:
            # a gathered row, since a view would keep the memory of the whole batch
            self.ended.append((score, beam, reason, state[[parent]]))
            self.ended.sort(key=lambda each: -each[0])
            del self.ended[self.best :]

    def _may_improve(self) -> bool:
        """Tell whether a continuation of a beam that is alive can still be among the best."""
        if not self.alive or len(self.ended) < self.best:
            return bool(self.alive)
        # totals only fall, so at best one stays as it is; which length is then the best one
        # depends on the sign of the penalty
        total, length = self.alive[0].total, len(self.alive[0].tokens)
        hope = max(self.score(total, length + 1), self.score(total, self.longest))
        return hope > self.ended[-1][0]


@torch.inference_mode()
def _run(
    model: MambaLM,
    step: Step,
    searches: Sequence[_Search],
    before: ModelState | None,
    plan: Plan,
) -> None:
    """Advance all searches side by side; one that is over leaves the batch."""
    going = list(enumerate(searches))
    logits, state = read(model, [search.prompt for search in searches], before)
    while True:
        owners = [i for i, search in going for _ in search.alive]
        texts = []
        if plan.processors:
            texts = [
                torch.cat([search.prompt, search.prompt.new_tensor(beam.tokens)])
                for _, search in going
                for beam in search.alive
            ]
        scores = plan.scores(logits, texts)
        highest = scores.amax(dim=-1)
        dead = highest == -torch.inf  # no token may follow
        require_scored(dead | highest.isfinite(), owners)
        scores = scores.to(exact_device(scores.device)).double()
        log_p = scores.log_softmax(dim=-1).masked_fill(
            dead.to(scores.device)[:, None], -torch.inf
        )
        keep, start = [], 0
        for i, search in going:
            stop = start + len(search.alive)
            parents = search.advance(log_p[start:stop], state[start:stop])
            if not search.alive and not search.ended:
                raise unscored(i)
            keep += [start + parent for parent in parents]
            start = stop
        going = [(i, search) for i, search in going if search.alive]
        if not going:
            return
        tokens = [beam.tokens[-1] for _, search in going for beam in search.alive]
        logits, state = step(torch.tensor(tokens, device=model.device), state[keep])


def _collect(
    searches: Sequence[_Search],
    texts: Sequence[TextStream] | None,
    last: Rows,
    written: Sequence[int],
) -> Completions:
    rows = [each for search in searches for each in search.ended]
    owners = [i for i, search in enumerate(searches) for _ in search.ended]
    device = last[0].device
    tokens = [torch.tensor(beam.tokens, device=device) for _, beam, _, _ in rows]
    pairs = list(zip(owners, rows, strict=True))
    return Completions(
        tokens=tuple(tokens),
        log_probabilities=tuple(
            torch.tensor(beam.log_probabilities, device=device) for _, beam, _, _ in rows
        ),
        finish_reasons=tuple(reason for _, _, reason, _ in rows),
        texts=None
        if texts is None
        else tuple(_text(texts[i], beam.tokens, reason) for i, (_, beam, reason, _) in pairs),
        alternatives=None,
        bookmark=Bookmark.of_texts(
            ModelState.cat([state for *_, state in rows]),
            [torch.cat([last[i], new]) for i, new in zip(owners, tokens, strict=True)],
            [
                written[i] + len(beam.tokens) if reason == "length" else 0
                for i, (_, beam, reason, _) in pairs
            ],
        ),
        scores=tuple(score for score, *_ in rows),
    )


def _text(begun: TextStream, tokens: Sequence[int], reason: FinishReason) -> str:
    """Return the text of tokens; of one that ended by its length, as ``Stopping`` does."""
    text = copy.copy(begun)
    if reason == "length":
        return "".join([*map(text.push, tokens), text.pause()])
    return "".join([*map(text.push, tokens[:-1]), text.finish()])
