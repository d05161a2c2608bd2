"""Generation from text to text: prompts, characters as they come, stop strings."""

import codecs
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from mambakit.data import Tokenizer
from mambakit.models import MambaLM

from .generate import stream

_REPLACEMENT = "\ufffd".encode()
_LONGEST_CHARACTER = 4


class TextStream:
    """Turn tokens into text as they come, and end it before a stop string.

    A character whose bytes are spread over tokens appears with the last of them; bytes that
    are not UTF-8 become U+FFFD. Text that may be the beginning of a stop string is held back
    until it is known whether it is one, wherever tokens begin and end.

    Args:
        tokenizer: Turns token ids into bytes.
        stop: Strings that end the text; none of them appears in it.

    Raises:
        ValueError: A stop string is empty, or ``stop`` is one string.

    Example:
        >>> from mambakit.data import ByteTokenizer
        >>> text = TextStream(ByteTokenizer(), stop=["END"])
        >>> [text.push(token) for token in "né ENDLESS".encode()]
        ['n', '', 'é', ' ', '', '', '', '', '', '', '']
        >>> text.stopped
        True
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        if isinstance(stop, str):
            raise ValueError(f"generate: stop must be a list of strings, got {stop!r}")
        for string in stop:
            if not string:
                raise ValueError("generate: stop strings must not be empty, got ''")
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._context: list[int] = []
        self._pending: list[int] = []
        self._held = ""

    def push(self, token: int) -> str:
        """Take one more token; return the text that is certain now, which may be empty."""
        if self.stopped:
            return ""
        self._pending.append(token)
        return self._release(self._decoder.decode(self._decode_pending(last=False)), last=False)

    def finish(self) -> str:
        """Return the text that was held back, now that no more tokens will come."""
        if self.stopped:
            return ""
        text = self._decoder.decode(self._decode_pending(last=True), final=True)
        return self._release(text, last=True)

    def _decode_pending(self, last: bool) -> bytes:
        """Decode the pending tokens, unless they seem to end within a character.

        Tokenizers that do not work on bytes decode a token by what stands before it (a space,
        the rest of a character), so the tokens decoded last are decoded along with them.
        """
        known = self._tokenizer.decode_bytes(self._context)
        data = self._tokenizer.decode_bytes(self._context + self._pending)[len(known) :]
        waiting = data.endswith(_REPLACEMENT) and len(self._pending) < _LONGEST_CHARACTER
        if waiting and not last:
            return b""
        if self._pending:
            self._context, self._pending = self._pending, []
        return data

    def _release(self, text: str, last: bool) -> str:
        text = self._held + text
        found = [at for at in (text.find(string) for string in self._stop) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = 0 if last else self._begun(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _begun(self, text: str) -> int:
        """Return how many characters at the end of ``text`` may begin a stop string."""
        longest = max((len(string) for string in self._stop), default=1) - 1
        for k in range(min(longest, len(text)), 0, -1):
            if any(string.startswith(text[-k:]) for string in self._stop):
                return k
        return 0


def stream_text(
    model: MambaLM,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_new_tokens: int,
    stop: Sequence[str] = (),
    **settings: Any,
) -> Iterator[str]:
    """Yield the continuation of ``prompt``, piece by piece, as soon as its text is certain.

    The pieces put together are what ``generate_text`` returns. Arguments are checked at once.

    Args:
        model: The language model.
        tokenizer: The one that the model was trained with.
        prompt: Text to continue, at least one token long. It is not yielded.
        max_new_tokens: New tokens, at most.
        stop: The text ends before the first of these strings to appear in it.
        settings: The other settings of ``generate``: ``temperature``, ``top_k``, ``seed``, ...
            ``vocab_size`` is the tokenizer's where the model's is larger.

    Raises:
        ValueError: As ``generate``, or a stop string is empty, or the tokenizer cannot
            represent the prompt.

    Example:
        >>> from mambakit import MambaConfig, MambaLM
        >>> from mambakit.data import ByteTokenizer
        >>> model = MambaLM(MambaConfig(d_model=16, n_layer=1, vocab_size=256))
        >>> pieces = list(stream_text(model, ByteTokenizer(), "a", max_new_tokens=9, seed=0))
        >>> "".join(pieces) == generate_text(
        ...     model, ByteTokenizer(), ["a"], max_new_tokens=9, seed=0
        ... )[0]
        True
    """
    tokens = _encode(model, tokenizer, [prompt])
    text = TextStream(tokenizer, stop)
    settings = {"vocab_size": _known(model, tokenizer), **settings}
    steps = stream(model, tokens, max_new_tokens=max_new_tokens, **settings)
    ends = frozenset(settings.get("stop_tokens", ()))
    return _pieces(steps, text, ends)


def _pieces(steps: Iterator[Tensor], text: TextStream, ends: frozenset[int]) -> Iterator[str]:
    for step in steps:
        token = int(step)
        piece = "" if token in ends else text.push(token)
        if piece:
            yield piece
        if text.stopped:
            return
    piece = text.finish()
    if piece:
        yield piece


def generate_text(
    model: MambaLM,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    stop: Sequence[str] = (),
    **settings: Any,
) -> list[str]:
    """Continue a batch of prompts, and return the continuations without the prompts.

    Args:
        model: The language model.
        tokenizer: The one that the model was trained with.
        prompts: Texts to continue, all of the same number of tokens, which is at least one.
        max_new_tokens: New tokens for each text, at most.
        stop: Each text ends before the first of these strings to appear in it.
        settings: The other settings of ``generate``: ``temperature``, ``top_k``, ``seed``, ...
            ``vocab_size`` is the tokenizer's where the model's is larger.

    Raises:
        ValueError: As ``generate``, or the prompts have different numbers of tokens, or a stop
            string is empty, or the tokenizer cannot represent a prompt.

    Example:
        >>> from mambakit import MambaConfig, MambaLM
        >>> from mambakit.data import ByteTokenizer
        >>> model = MambaLM(MambaConfig(d_model=16, n_layer=1, vocab_size=256))
        >>> greedy = {"max_new_tokens": 5, "temperature": 0}
        >>> both = generate_text(model, ByteTokenizer(), ["ab", "cd"], **greedy)
        >>> alone = generate_text(model, ByteTokenizer(), ["cd"], **greedy)
        >>> both[1] == alone[0]
        True
    """
    tokens = _encode(model, tokenizer, prompts)
    texts = [TextStream(tokenizer, stop) for _ in prompts]
    ends = frozenset(settings.get("stop_tokens", ()))
    written = [""] * len(texts)
    ended = [False] * len(texts)
    settings = {"vocab_size": _known(model, tokenizer), **settings}
    for step in stream(model, tokens, max_new_tokens=max_new_tokens, **settings):
        for row, token in enumerate(step.tolist()):
            ended[row] = ended[row] or token in ends
            if not ended[row]:
                written[row] += texts[row].push(token)
                ended[row] = texts[row].stopped
        if all(ended):
            break
    return [head + text.finish() for head, text in zip(written, texts, strict=True)]


def _known(model: MambaLM, tokenizer: Tokenizer) -> int:
    """Return how many ids both know: a model may have more, which no text is made of."""
    return min(tokenizer.vocab_size, model.config.vocab_size)


def _encode(model: MambaLM, tokenizer: Tokenizer, prompts: Sequence[str]) -> Tensor:
    if isinstance(prompts, str) or not prompts:
        raise ValueError(
            f"generate: prompts must be a list of at least one text, got {prompts!r}"
        )
    rows = [torch.as_tensor(tokenizer.encode(prompt), dtype=torch.int64) for prompt in prompts]
    lengths = sorted({len(row) for row in rows})
    if len(lengths) > 1:
        raise ValueError(
            f"generate: prompts must all have the same number of tokens, got {lengths}"
        )
    return torch.stack(rows).to(model.device)
