"""How well a language model predicts text: bits for each byte, and perplexity."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from mambakit.data import Tokenizer
from mambakit.data.batches import NO_TARGET, find_starts
from mambakit.data.text import find_documents
from mambakit.models import MambaLM
from mambakit.models.documents import pack_documents


@dataclass(frozen=True)
class LanguageScore:
    """The cost of a text under a model. Scores of several texts add up with ``+``.

    Attributes:
        nats: ``-sum ln p(token | all tokens before it)``.
        tokens: How many tokens the sum runs over.
        bytes: How many bytes of text those tokens stand for.
    """

    nats: float
    tokens: int
    bytes: float

    def __add__(self, other: "LanguageScore") -> "LanguageScore":
        return LanguageScore(
            self.nats + other.nats, self.tokens + other.tokens, self.bytes + other.bytes
        )

    @property
    def loss(self) -> float:
        """Nats for each token: what training minimises."""
        return self.nats / self.tokens

    @property
    def bits_per_byte(self) -> float:
        """``nats / (ln 2 * bytes)``: comparable between tokenizers, and with compressors."""
        return self.nats / (math.log(2) * self.bytes)

    @property
    def perplexity(self) -> float:
        """``exp(loss)``, for each token: comparable only between equal tokenizers."""
        return math.exp(self.loss)


@torch.inference_mode()
def evaluate_tokens(
    model: MambaLM,
    tokens: NDArray,
    *,
    tokens_per_byte: float = 1.0,
    chunk: int = 1024,
    rows: int = 1,
    limit: int | None = None,
    documents: NDArray[np.int64] | None = None,
) -> LanguageScore:
    """Score a text of tokens, reading it in chunks and carrying the state between them.

    Every token after the first is predicted from all tokens before it, however long the
    text: no window has an edge. ``chunk`` bounds the memory, ``rows * chunk * vocabulary``
    logits, and does not change the result beyond rounding. The precision is that of the
    caller's autocast context; the sum is kept in float64.

    Args:
        model: The language model, on any device.
        tokens: The text ``(k,)``, k >= 2; it may be mapped from disk.
        tokens_per_byte: Turns the number of tokens scored into bytes.
        chunk: Steps that run at once.
        rows: Into how many equal parts the text is cut that run side by side, faster on a
            wide machine. Each part but the first starts without the text before it, and up to
            ``rows - 1`` tokens at the very end are left out; 1 is exact.
        limit: Score about so many tokens only, from the beginning of each part; ``None``
            means all.
        documents: Where documents begin in the text and, last, where it ends: each is then read
            from no state, and its first token is given. ``None`` makes one text of them all.

    Returns:
        The score of tokens 1 to k - 1: the first has nothing before it and is given.

    Raises:
        ValueError: The text is too short, no document has two tokens, a token is outside the
            model's vocabulary, or ``chunk``, ``rows`` or ``limit`` is below 1.
    """
    for name, value in (("chunk", chunk), ("rows", rows), ("limit", limit)):
        if value is not None and value < 1:
            raise ValueError(f"evaluate_tokens: {name} must be at least 1, got {value}")
    part = (len(tokens) - 1) // rows
    length = part if limit is None else min(part, max(1, limit // rows))
    if length < 1:
        raise ValueError(
            f"evaluate_tokens: tokens must number at least {rows + 1}, got {len(tokens)}"
        )
    starts = part * np.arange(rows)
    nats, scored = torch.zeros((), dtype=torch.float64), 0
    state = None
    was_training = model.training
    model.eval()
    try:
        for begin in range(0, length, chunk):
            end = min(begin + chunk, length)
            window = np.stack([tokens[s + begin : s + end + 1] for s in starts])
            low, high = window.min(), window.max()
            if low < 0 or high >= model.config.vocab_size:
                raise ValueError(
                    f"evaluate_tokens: tokens must be in [0, {model.config.vocab_size}), the "
                    f"model's vocabulary, got {low if low < 0 else high}"
                )
            batch = torch.from_numpy(window.astype(np.int64)).to(model.device)
            inputs, targets = batch[:, :-1], batch[:, 1:]
            if documents is None:
                logits, state = model(inputs, state)
                scored += targets.numel()
            else:
                first = find_starts(documents, starts + begin, window.shape[1])
                pack = pack_documents(inputs, first[:, :-1], state)
                logits, after = model(pack.tokens, pack.state, cu_seqlens=pack.cu_seqlens)
                state = after[pack.ends]
                targets = targets.masked_fill(first[:, 1:].to(model.device), NO_TARGET)
                scored += int((~first[:, 1:]).sum())
            losses = F.cross_entropy(
                logits.flatten(0, 1).float(),
                targets.flatten(),
                ignore_index=NO_TARGET,
                reduction="none",
            )
            nats += losses.cpu().double().sum()  # not every device has float64
    finally:
        model.train(was_training)
    if not scored:
        raise ValueError(
            "evaluate_tokens: documents must have tokens to score after their first, got none"
        )
    return LanguageScore(nats.item(), scored, scored / tokens_per_byte)


def evaluate_whole(
    model: MambaLM,
    tokenizer: Tokenizer,
    tokens: NDArray,
    *,
    size: int,
    chunk: int = 1024,
    documents: NDArray[np.int64] | None = None,
) -> LanguageScore:
    """Score a text from its first token on, as a complete code for its bytes.

    The first token, which nothing precedes, costs ``ln vocab_size`` nats (a uniform guess);
    every other one what ``evaluate_tokens`` says.

    Args:
        model: The language model.
        tokenizer: The tokenizer that made the tokens.
        tokens: The text ``(k,)``, k >= 1.
        size: How many bytes the text has.
        chunk: Steps that run at once; it bounds the memory only.
        documents: As in ``evaluate_tokens``; nothing precedes the first token of each.

    Raises:
        ValueError: A token is outside the model's vocabulary, or ``chunk`` is below 1.
    """
    first = 1 if documents is None else len(np.unique(documents)) - 1
    score = LanguageScore(first * math.log(tokenizer.vocab_size), first, 0)
    if len(tokens) > first:
        score += evaluate_tokens(model, tokens, chunk=chunk, documents=documents)
    return LanguageScore(score.nats, score.tokens, size)


def evaluate_files(
    model: MambaLM, tokenizer: Tokenizer, files: Sequence[Path | str], *, chunk: int = 1024
) -> dict[str, LanguageScore]:
    """Score whole files, each from no state, and say how many bits each byte costs.

    The first token of a file, which nothing precedes, costs ``ln vocab_size`` nats (a uniform
    guess), so that the score is that of a complete code for the file.

    Args:
        model: The language model.
        tokenizer: The tokenizer that the model was trained with.
        files: Files, folders (every file in them counts) or globs.
        chunk: Steps that run at once; it bounds the memory only.

    Returns:
        A score for each file, by path in the order given. Their sum is the score of all:
        ``sum(scores.values(), LanguageScore(0.0, 0, 0))``.

    Raises:
        ValueError: A file is missing, empty, without a token, or not readable by the
            tokenizer, or a folder holds no files; it is named.
    """
    scores: dict[str, LanguageScore] = {}
    for document in find_documents([str(file) for file in files], patterns=("*",)):
        text = document.read() if tokenizer.reads_bytes else document.read_text()
        try:
            tokens = tokenizer.encode(text)
            if not len(tokens):  # blanks, say, that a tokenizer strips
                raise ValueError("its text must have tokens, got none")
            score = evaluate_whole(model, tokenizer, tokens, size=document.size, chunk=chunk)
        except ValueError as error:
            raise ValueError(f"{document.path}: {error}") from error
        scores[str(document.path)] = score
    return scores
