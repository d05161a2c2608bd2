"""Speculative decoding: a small model proposes tokens, the large one judges them at once."""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mambakit.models import MambaLM, ModelState

from .chance import RowChance
from .cpu_step import Weights
from .engine import Chosen, Plan, is_scored, mark_seen, require_scored, without_gradients
from .history import StateHistory
from .prompts import Rows
from .sampling import SamplingRules, exact_device, is_whole, pick
from .stepping import reader, stepper
from .stopping import FinishReason, Stopping

# A pass over more tokens than these costs more than one of its own to bring the state forward.
_LONGEST_REREAD = 16


def judge(
    p: Float[Tensor, "k_and_1 v"],
    q: Float[Tensor, "k v"],
    proposed: Int[Tensor, " k"],
    u: Float[Tensor, " k_and_1"],
) -> tuple[int, Int[Tensor, ""]]:
    """Accept the first of the proposed tokens, and draw the one that comes after them.

        accept x_i while  u_i < p_i(x_i) / q_i(x_i);    then draw from  max(p_j - q_j, 0)

    Tokens drawn from ``q`` and judged so are distributed as if drawn from ``p``, one after the
    other: that is exact, whatever ``q`` is.

    Args:
        p: The probabilities that are wanted at each of the places, and after the last.
        q: Those that the proposed tokens were drawn with.
        proposed: One token for each place.
        u: Chance, uniform numbers of [0, 1).

    Returns:
        How many tokens are accepted, ``j``, and the token for place ``j``.

    Source: Leviathan et al., "Fast Inference from Transformers via Speculative Decoding", 2023,
    section 2.3.

    Example:
        >>> p = torch.tensor([[0.0, 1.0], [1.0, 0.0]]).double()
        >>> q = torch.tensor([[0.5, 0.5]]).double()
        >>> judge(p, q, torch.tensor([1]), torch.zeros(2).double())
        (1, tensor(0))
        >>> judge(p, q, torch.tensor([0]), torch.zeros(2).double())
        (0, tensor(1))
    """
    at = proposed[:, None]
    ratio = (p[:-1].gather(1, at) / q.gather(1, at))[:, 0]
    accepted = int((u[:-1] < ratio).long().cumprod(dim=0).sum())
    # after the last place nothing was proposed, so nothing is subtracted
    wanted = p[accepted]
    rest = wanted if accepted == len(q) else (wanted - q[accepted]).clamp(min=0)
    # rounding may leave nothing where p and q are equal
    rest = torch.where(rest.amax() > 0, rest, wanted)
    return accepted, pick((rest / rest.amax())[None], u[-1:])[0]


class Speculation:
    """Decode with a draft model, one row after the other, as ``Decoding`` does without.

    Each round the draft proposes some tokens, the model reads them all in one pass, and the
    first of them are accepted. The draft's state then goes back to the last accepted token, out
    of a history. The model's goes back where the pass has left the states after all tokens.
    Where it has left the last alone, the model's state only moves over tokens that are final:
    those accepted since are read again in the next pass, along with its proposals. So a round
    always reads the weights once.

    Args:
        model: The language model.
        draft: A smaller one with the same vocabulary.
        draft_tokens: How many tokens it proposes in each round, at most.
        prompts: As in ``Decoding``, and so are all that follow.

    Attributes:
        reasons: As in ``Decoding``.
        states: As in ``Decoding``.
        proposed: How many tokens the draft has proposed.
        accepted: How many of them the model has accepted.
    """

    def __init__(
        self,
        model: MambaLM,
        draft: MambaLM,
        draft_tokens: int,
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
        if not isinstance(draft, MambaLM):
            raise ValueError(f"generate: draft must be a MambaLM, got {type(draft).__name__}")
        for what, ours, theirs in (
            ("vocab_size", model.config.vocab_size, draft.config.vocab_size),
            ("device", model.device, draft.device),
        ):
            if ours != theirs:
                raise ValueError(
                    f"generate: draft must have the model's {what}, {ours}, got {theirs}"
                )
        if not is_whole(draft_tokens) or draft_tokens < 1:
            raise ValueError(
                "generate: draft_tokens must be a whole number of at least 1, "
                f"got {draft_tokens!r}"
            )
        self.reasons: dict[int, FinishReason] = {}
        self.states: list[tuple[list[int], ModelState]] = []
        self.proposed = self.accepted = 0
        self._model = model
        self._draft = draft
        self._guess = stepper(draft, weights)
        self._reread = reader(draft, weights)
        self._judge = reader(model, weights)
        self._rounds = weights is not None
        self._draft_tokens = draft_tokens
        self._prompts = prompts
        self._before = state
        self._samples = samples
        self._plan = plan
        self._keys = keys
        self._stopping = stopping
        self._keep_states = keep_states

    def __iter__(self) -> Iterator[Chosen]:
        """Yield the tokens of each round.

        Raises:
            ValueError: The logits of one of the models are no numbers.
        """
        return without_gradients(self._rounds_of_all())

    def _rounds_of_all(self) -> Iterator[Chosen]:
        for i, prompt in enumerate(self._prompts):
            before = None if self._before is None else self._before[i]
            read = self._model(prompt[None, :-1], before, last_only=True).state
            # what came before the prompt, the draft does not know: it guesses worse for that
            guessed = self._draft(prompt[None, :-1], last_only=True).state
            for row in range(i * self._samples, (i + 1) * self._samples):
                yield from self._decode(row, prompt, read, guessed)

    def _decode(
        self, row: int, prompt: Tensor, state: ModelState, draft: ModelState
    ) -> Iterator[Chosen]:
        chance = RowChance([self._keys[row]], prompt.device)
        text, unread, unguessed = prompt, prompt[-1:], prompt[-1:]
        left = self._plan.max_new_tokens
        reason: FinishReason | None = None if left else "length"
        # a prompt is read with the model's own weights, and so is what follows it chosen
        unrounded = self._rounds
        while reason is None:
            # the model's own token comes on top
            k = 0 if unrounded else min(self._draft_tokens, left - 1)
            proposed, q, history = self._propose(k, row, text, unguessed, draft, chance)
            passed = torch.cat([unread, proposed])
            judging = self._model if unrounded else self._judge
            logits, states = judging(passed[None], state)
            logits = logits[0, -k - 1 :]
            p = self._probabilities(row, logits, text, proposed)
            u = torch.cat([chance.draw() for _ in range(k + 1)])
            j, last = judge(p, q, proposed.to(p.device), u)
            self.proposed, self.accepted = self.proposed + k, self.accepted + j

            new = torch.cat([proposed[:j], last[None].to(proposed.device)])
            count, reason = self._look(row, new)
            new, left = new[:count], left - count
            if reason is None and not left:
                reason = "length"
            text = torch.cat([text, new])
            yield Chosen([row] * count, new, *self._plan.report(logits[:count], new))

            final = len(unread) + count - 1  # of what the pass has read
            if len(states) == len(passed) or final == len(passed):
                state, unread = states[min(final, len(states)) - 1], new[-1:]
            else:
                unread = torch.cat([unread, new])
            if len(unread) > (1 if reason and self._keep_states else _LONGEST_REREAD):
                state = self._model(unread[None, :-1], state, last_only=True).state
                unread = unread[-1:]
            if reason is None:
                draft = history.rewind(max(0, k - 1 - j)).state
                # of its own last proposal, or without one of what it was to read first, the
                # draft has never been asked what follows
                unguessed = torch.cat([unguessed, new])[-2:] if j == k else new[-1:]
            unrounded = False
        self._stopping.close(row, reason)
        self.reasons[row] = reason
        if self._keep_states:
            self.states.append(([row], state))

    def _propose(
        self,
        k: int,
        row: int,
        text: Tensor,
        unread: Tensor,
        state: ModelState,
        chance: RowChance,
    ) -> tuple[Int[Tensor, " k"], Float[Tensor, "k v"], StateHistory]:
        """Draw ``k`` tokens from the draft; keep its states to go back to."""
        proposed, history = unread[:0], StateHistory(state, depth=k)
        nothing = torch.empty(0, self._plan.vocab_size, device=exact_device(text.device))
        probabilities = [nothing]
        for _ in range(k):
            if len(unread) == 1:
                logits, state = self._guess(unread, state)
            else:
                logits, state = self._reread(unread[None], state)
                logits, state = logits[:, -1], state[-1]
            history = history.push(state)
            whole = torch.cat([text, proposed])
            q = self._probabilities(row, logits.flatten(0, -2), whole, unread[:0])
            unread = pick(q, chance.draw()).to(text.device)
            proposed = torch.cat([proposed, unread])
            probabilities.append(q)
        return proposed, torch.cat(probabilities), history

    def _probabilities(
        self, row: int, logits: Tensor, text: Tensor, proposed: Tensor
    ) -> Float[Tensor, "k_and_1 v"]:
        """Return what the rules make of logits after each token of ``proposed``."""
        rules, seen, texts = self._plan.rules, None, []
        if self._plan.processors or rules.repetition_penalty != 1:
            texts = [torch.cat([text, proposed[:i]]) for i in range(len(logits))]
        if rules.repetition_penalty != 1:
            seen = mark_seen(self._model, texts)[:, : self._plan.vocab_size]
        scores = self._plan.scores(logits, texts)
        require_scored(is_scored(scores), [row] * len(scores))
        return _probabilities(rules, scores, seen)

    def _look(self, row: int, tokens: Tensor) -> tuple[int, FinishReason | None]:
        """Return how many of the tokens belong to the row, and why it ends with them."""
        if self._stopping.blind:
            return len(tokens), None
        for i, token in enumerate(tokens.tolist()):
            reason = self._stopping.look(row, token)
            if reason is not None:
                return i + 1, reason
        return len(tokens), None


def _probabilities(
    rules: SamplingRules, scores: Tensor, seen: Tensor | None
) -> Float[Tensor, "b v"]:
    scores = rules.apply(scores, seen)
    scores = scores.to(exact_device(scores.device)).double()
    if rules.greedy:
        return torch.zeros_like(scores).scatter_(1, scores.argmax(dim=1, keepdim=True), 1)
    return scores.softmax(dim=-1)
