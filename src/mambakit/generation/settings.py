"""Checks of what callers ask for, and its assembly into a decoder."""

import copy
from collections.abc import Iterable, Sequence
from itertools import islice, takewhile
from typing import NamedTuple, get_args

import torch
from jaxtyping import Int
from torch import Tensor

from mambakit.data import Tokenizer
from mambakit.models import MambaLM, ModelState

from .bookmark import REMEMBERED, Bookmark
from .chance import row_keys
from .cpu_step import Weights
from .engine import Decoding, LogitsProcessor, Plan
from .prompts import Rows, as_rows, begin
from .sampling import SamplingRules, is_whole
from .speculative import Speculation
from .stopping import OnText, Stopping, end_tokens, stop_strings
from .text_stream import TextStream


class Run(NamedTuple):
    """A decoder that is ready to start, and what it was made from.

    Attributes:
        decoder: Yields the tokens.
        stopping: Holds the texts.
        plan: What is to be done.
        before: The last tokens before each row's first new one, as many as a bookmark keeps.
        written: How many of those belong to the same text as the new ones.
    """

    decoder: Decoding | Speculation
    stopping: Stopping
    plan: Plan
    before: Rows
    written: list[int]

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return len(self.before)


def prepare(
    model: MambaLM,
    prompts: Int[Tensor, "b l"] | Sequence[Int[Tensor, " _"]] | Sequence[str] | None,
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
    stop: str | Sequence[str] | Sequence[Sequence[str]] = (),
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
    check_model(model)
    rules = SamplingRules(temperature, top_k, top_p, min_p, repetition_penalty)
    asked = None if prompts is None else as_rows(model, prompts, tokenizer)
    rows, before = begin(model, asked, state)
    check_count("max_new_tokens", max_new_tokens, 0)
    check_count("samples", samples, 1)
    if samples > 1 and rules.greedy:
        raise ValueError(
            "generate: samples must be 1 with temperature 0, where all are equal, "
            f"got {samples}"
        )
    check_weights(weights)
    check_tokenizer(tokenizer)
    stops = stop_strings(stop, len(rows))
    if tokenizer is None and (any(stops) or on_text is not None):
        raise ValueError("generate: tokenizer must be given with stop or on_text")
    if on_text is not None and not callable(on_text):
        raise ValueError(f"generate: on_text must be a function, got {on_text!r}")
    vocab_size = choosable(model, vocab_size, tokenizer)
    check_count("alternatives", alternatives, 0)
    if alternatives > vocab_size:
        raise ValueError(
            f"generate: alternatives must be at most the {vocab_size} ids that can be chosen, "
            f"got {alternatives}"
        )
    processors = checked_processors(logits_processors)
    plan = Plan(max_new_tokens, rules, vocab_size, processors, score, alternatives)
    ends = [end for end in end_tokens(model, stop_tokens, len(rows)) for _ in range(samples)]
    texts, written = None, already_written(asked, state, len(rows))
    last = last_tokens(rows, state)
    if tokenizer is not None:
        streams = begin_texts(tokenizer, stops, prompts, last, written)
        texts = [copy.copy(stream) for stream in streams for _ in range(samples)]
    stopping = Stopping(ends, texts, on_text, goes_on=keep_states)
    keys = row_keys(seed, generator, len(rows), samples)
    what = (rows, before, samples, plan, keys, stopping)
    decoder: Decoding | Speculation
    if draft is None:
        decoder = Decoding(model, *what, weights=weights, keep_states=keep_states)
    else:
        decoder = Speculation(
            model, draft, draft_tokens, *what, weights=weights, keep_states=keep_states
        )
    return Run(
        decoder,
        stopping,
        plan,
        [row for row in last for _ in range(samples)],
        [one for one in written for _ in range(samples)],
    )


def last_tokens(rows: Rows, state: ModelState | Bookmark | None) -> Rows:
    """Return the last tokens before what is to be written, as far as they are known."""
    if isinstance(state, Bookmark):
        rows = [
            torch.cat([known.to(row.device), row])
            for known, row in zip(state.remembered(), rows, strict=True)
        ]
    return [row[-1 - REMEMBERED :] for row in rows]


def already_written(
    prompts: Rows | None, state: ModelState | Bookmark | None, rows: int
) -> list[int]:
    """Return how many of the last tokens belong to each text that is to go on.

    After a prompt a new text begins.
    """
    if not isinstance(state, Bookmark) or state.written is None:
        return [0] * rows
    before = state.written.tolist()
    if prompts is None:
        return before
    return [0 if len(prompt) else count for prompt, count in zip(prompts, before, strict=True)]


def begin_texts(
    tokenizer: Tokenizer,
    stops: Sequence[tuple[str, ...]],
    prompts: Sequence[object] | Tensor | None,
    last: Rows,
    written: Sequence[int],
) -> list[TextStream]:
    """Return the texts that come after the ``last`` tokens, one for each prompt."""
    # what a text ends with is a whole character; tokens may have begun one
    texts = [None] * len(last) if prompts is None or isinstance(prompts, Tensor) else prompts
    whole = [isinstance(text, str) and text != "" for text in texts]
    every = iter(torch.cat(last).tolist())  # all at once, since a GPU has to be waited for
    before = [_as_text(list(islice(every, len(row))), tokenizer) for row in last]
    return [
        TextStream(tokenizer, stop, before=tokens, written=min(count, len(tokens)), whole=known)
        for stop, tokens, count, known in zip(stops, before, written, whole, strict=True)
    ]


def _as_text(tokens: list[int], tokenizer: Tokenizer) -> list[int]:
    """Return the last tokens that the tokenizer knows; a model may know others beside them."""
    known = takewhile(lambda token: token < tokenizer.vocab_size, reversed(tokens))
    return list(known)[::-1]


def check_model(model: object) -> None:
    """Refuse what is no language model, compiled or not."""
    # what stands in for one, such as a wrapper that shards it, has its attributes
    known = isinstance(getattr(model, "_orig_mod", model), MambaLM)
    if not known and not (callable(model) and hasattr(model, "config")):
        raise ValueError(f"generate: model must be a MambaLM, got {type(model).__name__}")


def checked_processors(processors: object) -> tuple[LogitsProcessor, ...]:
    """Return logits processors as a tuple.

    Raises:
        ValueError: They are no list of functions.
    """
    if not isinstance(processors, Iterable):
        raise ValueError(
            f"generate: logits_processors must be a list of functions, got {processors!r}"
        )
    several = tuple(processors)
    for processor in several:
        if not callable(processor):
            raise ValueError(
                f"generate: logits_processors must be a list of functions, got {processor!r}"
            )
    return several


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
