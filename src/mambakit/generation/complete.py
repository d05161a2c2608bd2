"""Continuations with all there is to know about them."""

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from mambakit.data import Tokenizer
from mambakit.models import MambaLM, ModelState

from .bookmark import Bookmark
from .completions import Completions, by_row, gather_states
from .cpu_step import Weights
from .engine import LogitsProcessor
from .settings import prepare
from .speculative import Speculation
from .stopping import OnText


def complete(
    model: MambaLM,
    prompts: Int[Tensor, "b l"] | Sequence[Int[Tensor, " _"]] | Sequence[str] | None = None,
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
) -> Completions:
    """Continue each prompt, and tell all about it: texts, probabilities, reasons, states.

    Prompts may differ in length; nothing is padded: those of one length are read together, all
    are then decoded side by side, and a row that has ended leaves the batch. Each prompt is
    read once, however many samples go on from it.

    Args:
        model: The language model.
        prompts: A tensor (b, l), a list of rows of tokens of any lengths, or a list of texts;
            each at least one token long. ``None`` goes on from a bookmark.
        max_new_tokens: New tokens for each row, at most; 0 reads the prompts alone.
        samples: Continuations of each prompt. They lie in succession: sample ``j`` of prompt
            ``i`` is row ``i samples + j``.
        temperature: As in ``generate``, and so are the settings up to ``vocab_size``.
        top_k: As in ``generate``.
        top_p: As in ``generate``.
        min_p: As in ``generate``.
        repetition_penalty: As in ``generate``.
        logits_processors: As in ``generate``.
        vocab_size: As in ``generate``; ``None`` also leaves out what the tokenizer has not.
        stop_tokens: A row ends with the first of these it produces. A list of lists has one for
            each prompt.
        stop: A row ends with the first of these strings to appear in its text, which ends
            before it: one string or several for all, or a list of such, one for each prompt.
            Needs a tokenizer.
        tokenizer: Makes the texts, and reads prompts that are texts.
        on_text: Called with a row and a piece of its text, as soon as the piece is certain.
        seed: As in ``generate``: one stream for each row, or with a list, for each sample of
            each prompt. It begins anew with each call, also with one that goes on from a
            bookmark: to be sure of other chance there, give another seed.
        generator: As in ``generate``.
        state: What comes before the prompts: a model's state of one sequence for each, or the
            bookmark of earlier completions. ``state.fork(k)`` begins k prompts from one.
        draft: A smaller model of the same vocabulary, which proposes tokens that ``model``
            judges several at a time. The distribution of the tokens is exactly the same, but a
            seed draws others. Rows are decoded one after the other. The draft does not
            know what ``state`` has read.
        draft_tokens: How many tokens it proposes at a time.
        weights: As in ``generate``, for the draft too.
        alternatives: How many of the likeliest tokens to return at each place.

    Returns:
        The rows' tokens, texts, log-probabilities, finish reasons and places to go on from.
        A text is what the new tokens add to that of the tokens before them. Where its length
        ended it within a character, that is left out; it comes whole with the tokens after the
        bookmark.

    Raises:
        ValueError: As ``generate``.
        RuntimeError: As ``generate``.

    Source: the draft is that of Leviathan et al., "Fast Inference from Transformers via
    Speculative Decoding", 2023.

    Example:
        >>> from mambakit import MambaConfig
        >>> model = MambaLM(MambaConfig(d_model=16, n_layer=1, vocab_size=30))
        >>> prompts = [torch.tensor([1, 2, 3]), torch.tensor([4])]
        >>> both = complete(model, prompts, max_new_tokens=5, temperature=0)
        >>> alone = complete(model, prompts[1:], max_new_tokens=5, temperature=0)
        >>> torch.equal(both.tokens[1], alone.tokens[0])
        True
    """
    run = prepare(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        samples=samples,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        logits_processors=logits_processors,
        vocab_size=vocab_size,
        stop_tokens=stop_tokens,
        stop=stop,
        tokenizer=tokenizer,
        on_text=on_text,
        seed=seed,
        generator=generator,
        state=state,
        draft=draft,
        draft_tokens=draft_tokens,
        weights=weights,
        alternatives=alternatives,
        score=True,
        keep_states=True,
    )
    columns = by_row(list(run.decoder), run.rows, alternatives, model.device)
    reasons = tuple(run.decoder.reasons[row] for row in range(run.rows))
    whole = [torch.cat(pair) for pair in zip(run.before, columns.tokens, strict=True)]
    written = [
        before + len(new) if reason == "length" else 0
        for before, new, reason in zip(run.written, columns.tokens, reasons, strict=True)
    ]
    acceptance = None
    if isinstance(run.decoder, Speculation) and run.decoder.proposed:
        acceptance = run.decoder.accepted / run.decoder.proposed
    return Completions(
        tokens=columns.tokens,
        log_probabilities=columns.log_probabilities,
        finish_reasons=reasons,
        texts=None if tokenizer is None else tuple(run.stopping.written),
        alternatives=columns.alternatives,
        bookmark=Bookmark.of_texts(gather_states(run.decoder.states), whole, written),
        acceptance=acceptance,
    )
