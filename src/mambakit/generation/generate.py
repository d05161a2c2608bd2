"""Continuations of token prompts, as tensors: the plain way to generate."""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Bool, Int, Integer
from torch import Tensor

from mambakit.models import MambaLM, ModelState

from .bookmark import Bookmark
from .cpu_step import Weights
from .engine import LogitsProcessor
from .prompts import without_padding
from .settings import Run, prepare


def generate(
    model: MambaLM,
    tokens: Int[Tensor, "b l"],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    logits_processors: Sequence[LogitsProcessor] = (),
    vocab_size: int | None = None,
    stop_tokens: Sequence[int] | Sequence[Sequence[int]] = (),
    seed: int | Sequence[int] | None = None,
    generator: torch.Generator | None = None,
    state: ModelState | Bookmark | None = None,
    weights: Weights | None = None,
    attention_mask: Bool[Tensor, "b l"] | Integer[Tensor, "b l"] | None = None,
    lengths: Int[Tensor, " b"] | None = None,
) -> Int[Tensor, "b l_out"]:
    """Continue each row of ``tokens`` by up to ``max_new_tokens`` tokens.

        token_{t+1} ~ softmax(rules(logits_t))

    The rules apply in this order: logits processors, repetition penalty, temperature, top-k,
    top-p, min-p. Ids from ``vocab_size`` on are never chosen, before any rule. Time for each
    new token does not depend on how many there are already. Prompts of different lengths,
    several samples, log-probabilities and the state at the end: see ``complete``.

    Args:
        model: The language model.
        tokens: Prompts of one length, at least 1, on the model's device; or padded to one.
        max_new_tokens: New tokens for each row, at most; 0 gives ``tokens`` back.
        temperature: Divides the logits; 0 takes the most likely token each time.
        top_k: Only the ``k`` most likely tokens; ``None`` means all.
        top_p: Only the most likely tokens that make up this probability; ``None`` means all.
        min_p: Only tokens at least this many times as likely as the likeliest; ``None`` means
            all.
        repetition_penalty: Above 1, tokens of the prompt and of the continuation so far get
            less likely.
        logits_processors: Functions that change the logits ``(b, vocab_size)``, in order; each
            is also given the tokens of each row so far, prompt first, as a list of tensors.
        vocab_size: Only ids below it are chosen, such as those that a tokenizer knows of a
            model that has more; ``None`` means ``config.vocab_size``.
        stop_tokens: A row ends with the first of these it produces, and repeats it until all
            rows have ended. A list of lists has one for each row.
        seed: Same seed, same tokens. Each row draws from a stream of its own, fixed by the seed
            and the row's number; a list gives each row its own seed, and then a row's tokens
            depend on nothing else in the batch. At least -2**63 and below 2**64; ``None`` asks
            torch's global state for one.
        generator: Where to ask for a seed instead.
        state: What comes before ``tokens``: a model's state of as many sequences, or a bookmark
            of an earlier generation. The repetition penalty and the processors do not know
            which tokens it has read.
        weights: ``"bf16"`` or ``"int8"`` rounds the matrices that each new token reads, which
            makes decoding faster, and its probabilities a little other: see the guide. The
            prompt is read with the model's own weights. The rounded copy is made once and
            stays as long as the model. ``None`` rounds nothing.
        attention_mask: 1 or true at the tokens of each prompt and 0 or false at its padding,
            left or right. The padding is cut off and never read.
        lengths: How many tokens each prompt has, where all padding is right of them.

    Returns:
        ``tokens`` as they were given, with their padding, and the continuations, int64. Fewer
        than ``max_new_tokens`` are new where every row has ended.

    Raises:
        ValueError: A setting breaks its rule or contradicts another, a prompt is empty, a token
            is outside the vocabulary, the state is of another model or number of rows, or the
            logits are no numbers.
        RuntimeError: The weights cannot be rounded for this model or on this machine.

    Example:
        >>> from mambakit import MambaConfig, MambaLM
        >>> model = MambaLM(MambaConfig(d_model=16, n_layer=1, vocab_size=30))
        >>> prompt = torch.tensor([[1, 2, 3]])
        >>> more = generate(model, prompt, max_new_tokens=4, temperature=0)
        >>> more.shape
        torch.Size([1, 7])
        >>> bool(more[0, 3] == model(prompt).logits[0, -1, :30].argmax())
        True
    """
    steps = stream(
        model,
        tokens,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        logits_processors=logits_processors,
        vocab_size=vocab_size,
        stop_tokens=stop_tokens,
        seed=seed,
        generator=generator,
        state=state,
        weights=weights,
        attention_mask=attention_mask,
        lengths=lengths,
    )
    return torch.cat([tokens.long(), *(step[:, None] for step in steps)], dim=1)


def stream(
    model: MambaLM,
    tokens: Int[Tensor, "b l"],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    logits_processors: Sequence[LogitsProcessor] = (),
    vocab_size: int | None = None,
    stop_tokens: Sequence[int] | Sequence[Sequence[int]] = (),
    seed: int | Sequence[int] | None = None,
    generator: torch.Generator | None = None,
    state: ModelState | Bookmark | None = None,
    weights: Weights | None = None,
    attention_mask: Bool[Tensor, "b l"] | Integer[Tensor, "b l"] | None = None,
    lengths: Int[Tensor, " b"] | None = None,
) -> Iterator[Int[Tensor, " b"]]:
    """Yield the tokens of ``generate`` as they are chosen, one for each row at a time.

    Arguments are those of ``generate`` and are checked at once, before the first token is asked
    for. Dropping the iterator ends the work.

    Raises:
        ValueError: As ``generate``.
        RuntimeError: As ``generate``.

    Example:
        >>> from mambakit import MambaConfig, MambaLM
        >>> model = MambaLM(MambaConfig(d_model=16, n_layer=1, vocab_size=30))
        >>> prompt = torch.tensor([[1, 2, 3]])
        >>> steps = list(stream(model, prompt, max_new_tokens=4, seed=0))
        >>> whole = generate(model, prompt, max_new_tokens=4, seed=0)
        >>> torch.equal(torch.stack(steps, dim=1), whole[:, 3:])
        True
    """
    if not isinstance(tokens, Tensor):
        raise ValueError(f"generate: tokens must be a tensor, got {type(tokens).__name__}")
    run = prepare(
        model,
        without_padding(tokens, attention_mask, lengths),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        logits_processors=logits_processors,
        vocab_size=vocab_size,
        stop_tokens=stop_tokens,
        seed=seed,
        generator=generator,
        state=state,
        weights=weights,
    )
    return _side_by_side(run)


def _side_by_side(run: Run) -> Iterator[Tensor]:
    """Yield a token for every row: one that has ended repeats its last."""
    latest: Tensor | None = None
    for step in run.decoder:
        tokens = step.tokens
        if latest is not None and len(step.rows) < run.rows:
            at = torch.tensor(step.rows, device=tokens.device)
            tokens = latest.index_copy(0, at, tokens)
        latest = tokens
        yield tokens
