"""Checks of what callers ask for, and its assembly into a decoder."""

from collections.abc import Sequence
from typing import NamedTuple, get_args

import torch
from jaxtyping import Int
from torch import Tensor

from mambakit.data import Tokenizer
from mambakit.models import MambaLM, ModelState

from .bookmark import Bookmark
from .chance import row_keys
from .cpu_step import Weights
from .engine import Decoding, LogitsProcessor, Plan
from .prompts import Rows, as_rows, begin
from .sampling import SamplingRules, is_whole
from .speculative import Speculation
from .stopping import OnText, Stopping, end_tokens
from .text_stream import TextStream


class Run(NamedTuple):
    """A decoder that is ready to start, and what it was made from."""

    decoder: Decoding | Speculation
    stopping: Stopping
    plan: Plan
    prompts: Rows
    rows: int


def prepare(
    model: MambaLM,
    prompts: Int[Tensor, "b l"] | Sequence[Int[Tensor, " l"]] | Sequence[str] | None,
    *,
    max_new_tokens: int,
    samples: int = 1,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    logits_processors: Sequence[LogitsProcessor] = (),
    vocab_size: int | None = None,
    stop_tokens: Sequence[int] | Sequence[Sequence[int]] = (),
    stop: Sequence[str] = (),
    tokenizer: Tokenizer | None = None,
    on_text: OnText | None = None,
    seed: int | Sequence[int] | None = None,
    generator: torch.Generator | None = None,
    state: ModelState | Bookmark | None = None,
    draft: MambaLM | None = None,
    draft_tokens: int = 4,
    weights: Weights | None = None,
    alternatives: int = 0,
    score: bool = False,
    keep_states: bool = False,
) -> Run:
    """Check everything at once, before the first token, and make a decoder.

    Raises:
        ValueError: As ``complete``.
        RuntimeError: As ``complete``.
    """
    rules = SamplingRules(temperature, top_k, top_p, min_p, repetition_penalty)
    rows = None if prompts is None else as_rows(model, prompts, tokenizer)
    rows, before = begin(model, rows, state)
    check_count("max_new_tokens", max_new_tokens, 0)
    check_count("samples", samples, 1)
    if samples > 1 and rules.greedy:
        raise ValueError(
            "generate: samples must be 1 with temperature 0, where all are equal, "
            f"got {samples}"
        )
    check_weights(weights)
    check_tokenizer(tokenizer)
    if tokenizer is None and (stop or on_text is not None):
        raise ValueError("generate: tokenizer must be given with stop or on_text")
    vocab_size = choosable(model, vocab_size, tokenizer)
    check_count("alternatives", alternatives, 0)
    if alternatives > vocab_size:
        raise ValueError(
            f"generate: alternatives must be at most the {vocab_size} ids that can be chosen, "
            f"got {alternatives}"
        )
    for processor in logits_processors:
        if not callable(processor):
            raise ValueError(
                f"generate: logits_processors must be a list of functions, got {processor!r}"
            )
    plan = Plan(
        max_new_tokens, rules, vocab_size, tuple(logits_processors), score, alternatives
    )
    count = len(rows) * samples
    ends = [end for end in end_tokens(model, stop_tokens, len(rows)) for _ in range(samples)]
    texts = None
    if tokenizer is not None:
        texts = [TextStream(tokenizer, stop) for _ in range(count)]
    stopping = Stopping(ends, texts, on_text)
    keys = row_keys(seed, generator, len(rows), samples)
    what = (rows, before, samples, plan, keys, stopping)
    decoder: Decoding | Speculation
    if draft is None:
        decoder = Decoding(model, *what, weights=weights, keep_states=keep_states)
    else:
        decoder = Speculation(
            model, draft, draft_tokens, *what, weights=weights, keep_states=keep_states
        )
    return Run(decoder, stopping, plan, rows, count)


def check_count(name: str, value: object, least: int) -> None:
    """Refuse what is not a whole number of at least ``least``."""
    if not is_whole(value) or value < least:
        raise ValueError(
            f"generate: {name} must be a whole number of at least {least}, got {value!r}"
        )


def check_weights(weights: object) -> None:
    """Refuse what is no name of rounded weights."""
    names = get_args(Weights)
    if weights is not None and weights not in names:
        raise ValueError(
            f"generate: weights must be None or one of {', '.join(names)}, got {weights!r}"
        )


def check_tokenizer(tokenizer: object) -> None:
    """Refuse what cannot turn tokens into text."""
    if tokenizer is not None and not hasattr(tokenizer, "decode_bytes"):
        raise ValueError(
            f"generate: tokenizer must be a Tokenizer, got {type(tokenizer).__name__}"
        )


def choosable(model: MambaLM, vocab_size: int | None, tokenizer: Tokenizer | None) -> int:
    """Return below which id tokens can be chosen: what model and tokenizer both know."""
    known = model.config.vocab_size
    if vocab_size is None:
        return known if tokenizer is None else min(known, tokenizer.vocab_size)
    if not is_whole(vocab_size) or not 1 <= vocab_size <= known:
        raise ValueError(
            f"generate: vocab_size must be a whole number from 1 to the model's {known}, "
            f"got {vocab_size!r}"
        )
    return vocab_size
