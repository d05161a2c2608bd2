"""The loop over states: read the prompts, then one step for all rows that have not ended."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mambakit.models import MambaLM, ModelState

from .chance import RowChance
from .cpu_step import Weights
from .prompts import Rows, read, skim
from .sampling import SamplingRules
from .stepping import stepper
from .stopping import FinishReason, Stopping

# Devices that have computed what they are asked for by the time they answer.
_AT_ONCE = {"cpu"}

LogitsProcessor = Callable[[Float[Tensor, "b v"], list[Int[Tensor, " _"]]], Tensor]
"""Changes the scores of the next token, given each row's tokens so far."""


class Alternatives(NamedTuple):
    """The likeliest ``tokens`` at each place and their ``log_probabilities``, best first."""

    tokens: Int[Tensor, "k a"]
    log_probabilities: Float[Tensor, "k a"]


class Chosen(NamedTuple):
    """The next tokens of some ``rows``, which had not ended."""

    rows: list[int]
    tokens: Int[Tensor, " b"]
    log_probabilities: Float[Tensor, " b"] | None
    alternatives: Alternatives | None


@dataclass(frozen=True)
class Plan:
    """What a run is to do, checked.

    Attributes:
        max_new_tokens: New tokens for each row, at most.
        rules: How a token is chosen.
        vocab_size: Ids below it can be chosen.
        processors: What changes the logits before the rules do.
        score: Whether log-probabilities are wanted.
        alternatives: How many of the likeliest tokens are wanted at each place.
    """

    max_new_tokens: int
    rules: SamplingRules
    vocab_size: int
    processors: tuple[LogitsProcessor, ...] = ()
    score: bool = False
    alternatives: int = 0

    def scores(self, logits: Tensor, texts: list[Tensor]) -> Float[Tensor, "b v"]:
        """Return the logits of the ids that can be chosen, processed, in float32."""
        # a copy for processors, which may write into what they are given
        scores = logits[:, : self.vocab_size].to(torch.float32, copy=bool(self.processors))
        for processor in self.processors:
            shape = scores.shape
            scores = processor(scores, texts)
            if not isinstance(scores, Tensor) or scores.shape != shape:
                got = (
                    tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
                )
                raise ValueError(
                    f"generate: a logits processor must return logits of shape {tuple(shape)}, "
                    f"got {got}"
                )
            if scores.is_complex():
                raise ValueError(
                    f"generate: a logits processor must return real logits, got {scores.dtype}"
                )
        return scores

    def report(
        self, logits: Tensor, tokens: Tensor
    ) -> tuple[Float[Tensor, " b"] | None, Alternatives | None]:
        """Return the log-probabilities that the model itself gives to ``tokens``."""
        if not self.score:
            return None, None
        every = logits[:, : self.vocab_size].float().log_softmax(dim=-1)
        best = every.topk(self.alternatives, dim=-1) if self.alternatives else None
        return (
            every.gather(1, tokens[:, None])[:, 0],
            None if best is None else Alternatives(best.indices, best.values),
        )


def without_gradients(steps: Iterator[Chosen]) -> Iterator[Chosen]:
    """Yield the steps, each computed in inference mode and none of the caller's work in it.

    torch's decorator does so for what it sees to be a generator: not for one that is wrapped.
    """
    while True:
        with torch.inference_mode():
            step = next(steps, None)
        if step is None:
            return
        yield step


def is_scored(scores: Float[Tensor, "b v"]) -> Bool[Tensor, " b"]:
    """Tell for which rows the scores are numbers that allow at least one token."""
    return scores.amax(dim=-1).isfinite()


def require_scored(fine: Bool[Tensor, " b"], rows: Sequence[int]) -> None:
    """Refuse scores that no token can be chosen from.

    Raises:
        ValueError: One of ``rows`` is not ``fine``.
    """
    if not fine.all():
        raise unscored(rows[int(fine.int().argmin())])


def unscored(row: int) -> ValueError:
    """Return what to raise for a row that no token can be chosen for."""
    return ValueError(
        "generate: logits must be numbers and allow at least one token, got NaN, infinity "
        f"or no token in row {row}: look at the model's weights, the logits processors and "
        "the repetition penalty"
    )


def _send_here(*numbers: Tensor) -> Callable[[], list[Tensor]]:
    """Send numbers to the host; the call that is returned waits until they have arrived.

    It waits for nothing that a GPU is given to do after them.
    """
    here = [part.to("cpu", non_blocking=part.is_cuda) for part in numbers]
    if not numbers[0].is_cuda:
        return lambda: here
    sent = torch.cuda.Event()
    sent.record(torch.cuda.current_stream(numbers[0].device))

    def arrive() -> list[Tensor]:
        sent.synchronize()
        return here

    return arrive


def mark_seen(model: MambaLM, rows: Rows) -> Bool[Tensor, "b v"]:
    """Return which ids of the vocabulary each row holds."""
    seen = torch.zeros(
        len(rows), model.config.vocab_size, dtype=torch.bool, device=model.device
    )
    for met, row in zip(seen, rows, strict=True):
        met[row] = True
    return seen


class Decoding:
    """Decode rows side by side; a row that has ended leaves the batch.

    It is iterated over once, and works only as far as it is asked; or one step further, on a
    GPU whose tokens are looked at.

    Args:
        model: The language model.
        prompts: What each sequence of ``state`` reads first, at least one token.
        state: What comes before the prompts.
        samples: How many rows go on from each prompt.
        plan: What to do.
        keys: What fixes the chance of each row, as ``RowChance`` says.
        stopping: What ends rows; it is shown every token.
        weights: What the step reads, as ``stepper`` says.
        keep_states: Whether ``states`` is wanted.

    Attributes:
        reasons: Why each row has ended, by row.
        states: The states of the rows that have ended, in groups.
    """

    def __init__(
        self,
        model: MambaLM,
        prompts: Rows,
        state: ModelState | None,
        samples: int,
        plan: Plan,
        keys: Sequence[tuple[int, int]],
        stopping: Stopping,
        *,
        weights: Weights | None,
        keep_states: bool,
    ) -> None:
        self.reasons: dict[int, FinishReason] = {}
        self.states: list[tuple[list[int], ModelState]] = []
        self._model = model
        self._step = stepper(model, weights)
        self._prompts = prompts
        self._before = state
        self._samples = samples
        self._plan = plan
        self._keys = keys
        self._stopping = stopping
        self._keep_states = keep_states

    def __iter__(self) -> Iterator[Chosen]:
        """Yield the tokens of each step.

        Raises:
            ValueError: The logits are no numbers.
        """
        return without_gradients(self._steps())

    def _steps(self) -> Iterator[Chosen]:
        plan, samples = self._plan, self._samples
        rows = list(range(samples * len(self._prompts)))
        if not plan.max_new_tokens:
            # all but the last token, as ever: it has been chosen and not been read
            short = [row[:-1] for row in self._prompts]
            if self._keep_states:
                self.states.append((rows, skim(self._model, short, self._before, samples)))
            self.reasons |= dict.fromkeys(rows, "length")
            return

        device = self._model.device
        texts = [row for row in self._prompts for _ in range(samples)]
        seen = mark_seen(self._model, texts) if plan.rules.repetition_penalty != 1 else None
        # On a GPU a look at a number waits for it, so nobody looks without a reason. Where
        # somebody does, the next step is on its way meanwhile: a row that has ended is computed
        # once for nothing, and the GPU never waits for a look.
        at_once = device.type in _AT_ONCE
        looks = at_once or not self._stopping.blind
        early = looks and not at_once
        unseen: Tensor | None = None
        chance = RowChance(self._keys, device)
        logits, state = read(self._model, self._prompts, self._before, samples)
        for k in range(plan.max_new_tokens):
            last = k + 1 == plan.max_new_tokens
            reasons: Sequence[FinishReason | None] = [None] * len(rows)
            met = None if seen is None else seen[:, : plan.vocab_size]
            u = None if plan.rules.greedy else chance.draw()
            tokens, best = plan.rules.choose_scored(plan.scores(logits, texts), met, u)
            arrive = _send_here(tokens, best) if looks else None
            ahead = self._step(tokens, state) if early and not last else None
            if arrive is not None:
                known, best = arrive()
                require_scored(best.isfinite(), rows)
                reasons = self._look(rows, known)
            else:
                # 0 times what is no finite number is NaN, which no sum loses: one kernel
                unseen = best if unseen is None else torch.add(unseen, best, alpha=0)
                if last:
                    require_scored(unseen.isfinite(), rows)
            if last:
                reasons = [reason or "length" for reason in reasons]
            stay = [i for i, reason in enumerate(reasons) if reason is None]
            if len(stay) < len(rows):
                self._retire(rows, state, reasons)
            yield Chosen(rows, tokens, *plan.report(logits, tokens))

            if not stay:
                return
            if plan.processors:
                texts = [
                    torch.cat([*pair]) for pair in zip(texts, tokens[:, None], strict=True)
                ]
            if seen is not None:
                seen.scatter_(1, tokens[:, None], True)
            if len(stay) < len(rows):
                rows = [rows[i] for i in stay]
                texts = [texts[i] for i in stay]
                at = torch.tensor(stay, device=device)
                seen = None if seen is None else seen[at]
                chance.keep(stay)
                if ahead is None:
                    tokens, state = tokens[at], state[at]
                else:
                    ahead = ahead[0][at], ahead[1][at]
            logits, state = self._step(tokens, state) if ahead is None else ahead

    def _look(self, rows: list[int], tokens: Tensor) -> Sequence[FinishReason | None]:
        if self._stopping.blind:
            return [None] * len(rows)
        watched = zip(rows, tokens.tolist(), strict=True)
        return [self._stopping.look(row, token) for row, token in watched]

    def _retire(
        self, rows: list[int], state: ModelState, reasons: Sequence[FinishReason | None]
    ) -> None:
        """Note why some of the rows have ended, and keep their states."""
        ended = [i for i, reason in enumerate(reasons) if reason is not None]
        for row, reason in zip(rows, reasons, strict=True):
            if reason is not None:
                self._stopping.close(row, reason)
                self.reasons[row] = reason
        if self._keep_states:
            left = state if len(ended) == len(rows) else state[ended]
            self.states.append(([rows[i] for i in ended], left))
