"""Rules that turn the scores of the next token into one token, and the draw.

Each rule maps logits ``(b, v)`` to logits ``(b, v)`` and changes nothing in place; a token that
a rule forbids gets minus infinity. ``p = softmax(logits)`` below is taken over one row.
"""

from dataclasses import dataclass
from numbers import Integral, Real
from typing import NamedTuple, TypeGuard

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def penalise_repetition(
    logits: Float[Tensor, "b v"], seen: Bool[Tensor, "b v"], penalty: float
) -> Float[Tensor, "b v"]:
    """Make tokens that have been seen less likely.

        l_i = l_i / penalty  if l_i > 0  else  l_i penalty,      for each i that was seen

    Args:
        logits: Scores of the next token.
        seen: Which tokens each row has met, in its prompt or since.
        penalty: More than 1 discourages repetition, 1 changes nothing, less encourages it.

    Source: Keskar et al., "CTRL", 2019, section 4.1.

    Example:
        >>> seen = torch.tensor([[True, True, False]])
        >>> penalise_repetition(torch.tensor([[2.0, -2.0, 1.0]]), seen, 2.0)
        tensor([[ 1., -4.,  1.]])
    """
    penalised = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(seen, penalised, logits)


def apply_temperature(logits: Float[Tensor, "b v"], temperature: float) -> Float[Tensor, "b v"]:
    """Sharpen (below 1) or flatten (above 1) the distribution.

        l_i = l_i / temperature,     temperature > 0

    Example:
        >>> apply_temperature(torch.tensor([[1.0, 2.0]]), 0.5)
        tensor([[2., 4.]])
    """
    return logits / temperature


def keep_top_k(logits: Float[Tensor, "b v"], k: int) -> Float[Tensor, "b v"]:
    """Keep the ``k`` most likely tokens, and those as likely as the last of them.

        keep i  where  l_i >= the k-th largest of l

    Source: Fan et al., "Hierarchical Neural Story Generation", 2018, section 5.4.

    Example:
        >>> keep_top_k(torch.tensor([[1.0, 3.0, 2.0]]), 2)
        tensor([[-inf, 3., 2.]])
    """
    if k >= logits.shape[-1]:
        return logits
    threshold = logits.topk(k, dim=-1).values[:, -1:]
    return logits.masked_fill(logits < threshold, -torch.inf)


def keep_top_p(logits: Float[Tensor, "b v"], p: float) -> Float[Tensor, "b v"]:
    """Keep the fewest most likely tokens whose probabilities reach ``p`` together.

        keep i  where  sum of p_j over all j that are more likely than i  <  p

    Of equally likely tokens at the border, those with smaller ids are kept first. The most
    likely token always stays.

    Source: Holtzman et al., "The Curious Case of Neural Text Degeneration", 2020, section 3.1.

    Example:
        >>> keep_top_p(torch.tensor([[0.5, 0.3, 0.2]]).log(), 0.7).exp()
        tensor([[0.5000, 0.3000, 0.0000]])
    """
    probabilities = logits.softmax(dim=-1)
    if logits.device.type == "cpu":  # elsewhere their number would have to be waited for
        allowed = (logits != -torch.inf).any(dim=0).nonzero()[:, 0]
        if 0 < len(allowed) < logits.shape[-1]:
            few = _keep_first(logits[:, allowed], probabilities[:, allowed], p)
            return torch.full_like(logits, -torch.inf).index_copy(1, allowed, few)
    return _keep_first(logits, probabilities, p)


def _keep_first(logits: Tensor, probabilities: Tensor, p: float) -> Tensor:
    """Keep the most likely tokens until their probabilities reach ``p``."""
    order = logits.argsort(dim=-1, descending=True, stable=True)
    probabilities = probabilities.gather(-1, order)
    before = probabilities.cumsum(dim=-1) - probabilities
    forbidden = before >= p
    forbidden[:, 0] = False
    return logits.masked_fill(forbidden.scatter(-1, order, forbidden), -torch.inf)


def keep_min_p(logits: Float[Tensor, "b v"], p: float) -> Float[Tensor, "b v"]:
    """Keep the tokens that are at least ``p`` times as likely as the most likely one.

        keep i  where  p_i >= p max(p)

    Source: Nguyen et al., "Turning Up the Heat: Min-p Sampling", 2024, section 3.

    Example:
        >>> keep_min_p(torch.tensor([[0.6, 0.3, 0.1]]).log(), 0.4).exp()
        tensor([[0.6000, 0.3000, 0.0000]])
    """
    odds = (logits - logits.amax(dim=-1, keepdim=True)).exp()
    return logits.masked_fill(odds < p, -torch.inf)


def is_whole(value: object) -> TypeGuard[int]:
    """Tell whether ``value`` is an integer of Python or NumPy, and not a truth value."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


class Choice(NamedTuple):
    """The token chosen for each row, and the ``best`` of the row's scores.

    ``best`` is finite if and only if the scores are numbers that allow at least one token; the
    row's token means nothing where it is not.
    """

    tokens: Int[Tensor, " b"]
    best: Float[Tensor, " b"]


def likeliest(scores: Float[Tensor, "b v"]) -> Choice:
    """Choose the token with the largest score, of equal ones the first.

    Example:
        >>> likeliest(torch.tensor([[1.0, 3.0, 3.0], [0.0, torch.nan, 2.0]]))
        Choice(tokens=tensor([1, 1]), best=tensor([3., nan]))
    """
    if scores.device.type != "cpu":
        best, tokens = scores.max(dim=-1)
        return Choice(tokens, best)
    # NumPy's is up to twenty times as fast as PyTorch's on a CPU, where rows lie dense.
    rows = scores.detach().resolve_neg().numpy()
    tokens = torch.tensor([int(row.argmax()) for row in rows], dtype=torch.int64)
    return Choice(tokens, scores.gather(1, tokens[:, None])[:, 0])


@dataclass(frozen=True)
class SamplingRules:
    """Choose the next token: which rules apply, in this order, and how strongly.

    Attributes:
        repetition_penalty: See ``penalise_repetition``; 1 changes nothing.
        temperature: See ``apply_temperature``; 0 means the most likely token, always, and of
            equally likely ones the first.
        top_k: See ``keep_top_k``; ``None`` keeps all.
        top_p: See ``keep_top_p``; ``None`` keeps all.
        min_p: See ``keep_min_p``; ``None`` keeps all.

    Raises:
        ValueError: A value breaks its rule; the message names it.

    Example:
        >>> rules = SamplingRules(temperature=0)
        >>> rules.choose(torch.tensor([[0.1, 0.7, 0.2], [3.0, 1.0, 2.0]]))
        tensor([1, 0])
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not _is_number(self.temperature) or not 0 <= self.temperature < float("inf"):
            raise ValueError(
                "generate: temperature must be 0 or a positive number, "
                f"got {self.temperature!r}"
            )
        if self.top_k is not None and not (is_whole(self.top_k) and self.top_k >= 1):
            raise ValueError(
                f"generate: top_k must be a whole number of at least 1, got {self.top_k!r}"
            )
        if self.top_p is not None and not (_is_number(self.top_p) and 0 < self.top_p <= 1):
            raise ValueError(f"generate: top_p must be in (0, 1], got {self.top_p!r}")
        if self.min_p is not None and not (_is_number(self.min_p) and 0 <= self.min_p <= 1):
            raise ValueError(f"generate: min_p must be in [0, 1], got {self.min_p!r}")
        penalty = self.repetition_penalty
        if not _is_number(penalty) or not 0 < penalty < float("inf"):
            raise ValueError(
                f"generate: repetition_penalty must be a positive number, got {penalty!r}"
            )

    @property
    def greedy(self) -> bool:
        """Whether no chance is involved."""
        return self.temperature == 0

    def apply(
        self, logits: Float[Tensor, "b v"], seen: Bool[Tensor, "b v"] | None = None
    ) -> Float[Tensor, "b v"]:
        """Return the logits that tokens are drawn from, in float32.

        Args:
            logits: Scores of the next token.
            seen: Which tokens each row has met; needed by ``repetition_penalty`` alone.
        """
        return self._narrow(self._penalise(logits, seen))

    def _penalise(self, logits: Tensor, seen: Tensor | None) -> Tensor:
        logits = logits.float()
        if self.repetition_penalty == 1 or seen is None:
            return logits
        return penalise_repetition(logits, seen, self.repetition_penalty)

    def _narrow(self, logits: Tensor) -> Tensor:
        """Apply the rules that leave the likeliest token the likeliest."""
        if self.greedy:
            return logits
        if self.temperature != 1:
            logits = apply_temperature(logits, self.temperature)
        if self.top_k is not None:
            logits = keep_top_k(logits, self.top_k)
        if self.top_p is not None and self.top_p < 1:
            logits = keep_top_p(logits, self.top_p)
        if self.min_p is not None and self.min_p > 0:
            logits = keep_min_p(logits, self.min_p)
        return logits

    def choose(
        self,
        logits: Float[Tensor, "b v"],
        seen: Bool[Tensor, "b v"] | None = None,
        u: Float[Tensor, " b"] | None = None,
    ) -> Int[Tensor, " b"]:
        """Return one token for each row, int64.

        Args:
            logits: Scores of the next token.
            seen: Which tokens each row has met; needed by ``repetition_penalty`` alone.
            u: Chance, one uniform number of [0, 1) for each row, float64; ``None`` asks torch.
        """
        return self.choose_scored(logits, seen, u).tokens

    def choose_scored(
        self,
        logits: Float[Tensor, "b v"],
        seen: Bool[Tensor, "b v"] | None = None,
        u: Float[Tensor, " b"] | None = None,
    ) -> Choice:
        """Choose as ``choose`` does, and tell whether there was anything to choose from."""
        logits = self._penalise(logits, seen)
        if self.greedy:
            return likeliest(logits)
        best = logits.amax(dim=-1, keepdim=True)
        # the largest becomes 0 and stays it under every rule and at any temperature
        odds = self._narrow(logits - best).exp()
        return Choice(pick(odds, u), best[:, 0])


_WITHOUT_FLOAT64 = {"mps"}


def exact_device(device: torch.device) -> torch.device:
    """Return where to compute in float64: the device itself, or the CPU where it cannot.

    Example:
        >>> exact_device(torch.device("cuda", 1)), exact_device(torch.device("mps"))
        (device(type='cuda', index=1), device(type='cpu'))
    """
    without = device.type in _WITHOUT_FLOAT64 or (
        # some of these have it
        device.type == "xpu" and not torch.xpu.get_device_capability(device)["has_fp64"]
    )
    return torch.device("cpu") if without else device


def pick(odds: Float[Tensor, "b v"], u: Float[Tensor, " b"] | None = None) -> Int[Tensor, " b"]:
    """Draw one token for each row, with probabilities in the ratio of ``odds``.

        token = the first i with  odds_0 + ... + odds_i  >  u (odds_0 + ... + odds_v)

    Args:
        odds: From 0 to 1, and not all 0 in a row; they need not add up to 1.
        u: Chance, one uniform number of [0, 1) for each row, float64, on ``exact_device`` of
            the odds; ``None`` asks torch.

    Example:
        >>> odds = torch.tensor([[0.5, 0.0, 0.5]])
        >>> [pick(odds, torch.tensor([u]).double()).item() for u in (0.0, 0.49, 0.5, 0.99)]
        [0, 0, 2, 2]
    """
    device, exact = odds.device, exact_device(odds.device)
    odds = odds.to(exact)
    if u is None:
        u = torch.rand(len(odds), dtype=torch.float64, device=exact)
    # Whole numbers add up to the same sum in any order, so that the same chance gives the same
    # token on every run, also on a GPU. What this rounds away is below 1e-12.
    upto = (odds * 2.0**40).long().cumsum(dim=-1)
    total = upto[:, -1:]
    aim = (u[:, None] * total).long().minimum(total - 1)
    # a row of no numbers is refused by those who look, and until then must be some token
    tokens = torch.searchsorted(upto, aim, right=True)[:, 0].clamp(max=odds.shape[-1] - 1)
    return tokens.to(device)
