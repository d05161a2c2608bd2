"""Generation from text to text: whole continuations, or piece by piece."""

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

from mambakit.data import Tokenizer
from mambakit.models import MambaLM

from .settings import Run, prepare


def stream_text(
    model: MambaLM,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_new_tokens: int,
    stop: str | Sequence[str] = (),
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
        settings: The other settings of ``complete``: ``temperature``, ``top_k``, ``seed``, ...

    Raises:
        ValueError: As ``complete``, or a stop string is empty, or the tokenizer cannot
            represent the prompt, or there is more than one sample.
        RuntimeError: As ``complete``.

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
    if settings.get("samples", 1) != 1:
        raise ValueError(
            "generate: samples must be 1 for one stream of text, "
            f"got {settings['samples']!r}: stream_texts tells rows apart"
        )
    pieces = stream_texts(
        model, tokenizer, [prompt], max_new_tokens=max_new_tokens, stop=stop, **settings
    )
    return (piece for _, piece in pieces)


def stream_texts(
    model: MambaLM,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    stop: str | Sequence[str] | Sequence[Sequence[str]] = (),
    **settings: Any,
) -> Iterator[tuple[int, str]]:
    """Yield the continuations of a batch of prompts as pairs of a row and a piece of its text.

    The pieces of a row put together are its text. Arguments are those of ``generate_text`` and
    are checked at once.

    Raises:
        ValueError: As ``generate_text``, or ``on_text`` is given.
        RuntimeError: As ``complete``.

    Example:
        >>> from mambakit import MambaConfig, MambaLM
        >>> from mambakit.data import ByteTokenizer
        >>> model = MambaLM(MambaConfig(d_model=16, n_layer=1, vocab_size=256))
        >>> pieces = stream_texts(model, ByteTokenizer(), ["a", "bc"], max_new_tokens=3, seed=0)
        >>> sorted({row for row, _ in pieces})
        [0, 1]
    """
    if "on_text" in settings:
        raise ValueError("generate: on_text must not be given to a stream, which yields pieces")
    ready: deque[tuple[int, str]] = deque()
    _refuse_internal(settings)
    run = prepare(
        model,
        prompts,
        tokenizer=tokenizer,
        on_text=lambda row, piece: ready.append((row, piece)),
        max_new_tokens=max_new_tokens,
        stop=stop,
        **settings,
    )
    return _pieces(run, ready)


def _refuse_internal(settings: dict[str, Any]) -> None:
    """Refuse what ``complete`` alone asks for, whose result has more than texts."""
    for name in ("keep_states", "score", "alternatives"):
        if name in settings:
            raise ValueError(f"generate: {name} must not be given for texts alone")


def _pieces(run: Run, ready: deque[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    for _ in run.decoder:
        while ready:
            yield ready.popleft()
    yield from ready  # what ended with the last token


def generate_text(
    model: MambaLM,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    stop: str | Sequence[str] | Sequence[Sequence[str]] = (),
    **settings: Any,
) -> list[str]:
    """Continue a batch of prompts, and return the continuations without the prompts.

    A character that the last token has only begun is shown as U+FFFD.

    Args:
        model: The language model.
        tokenizer: The one that the model was trained with.
        prompts: Texts to continue, each at least one token long.
        max_new_tokens: New tokens for each text, at most.
        stop: Each text ends before the first of these strings to appear in it; as in
            ``complete``.
        settings: The other settings of ``complete``: ``temperature``, ``top_k``, ``seed``, ...

    Raises:
        ValueError: As ``complete``, or a stop string is empty, or the tokenizer cannot
            represent a prompt.
        RuntimeError: As ``complete``.

    Example:
        >>> from mambakit import MambaConfig, MambaLM
        >>> from mambakit.data import ByteTokenizer
        >>> model = MambaLM(MambaConfig(d_model=16, n_layer=1, vocab_size=256))
        >>> greedy = {"max_new_tokens": 5, "temperature": 0}
        >>> both = generate_text(model, ByteTokenizer(), ["ab", "c"], **greedy)
        >>> alone = generate_text(model, ByteTokenizer(), ["c"], **greedy)
        >>> both[1] == alone[0]
        True
    """
    _refuse_internal(settings)
    run = prepare(
        model,
        prompts,
        tokenizer=tokenizer,
        max_new_tokens=max_new_tokens,
        stop=stop,
        **settings,
    )
    deque(run.decoder, maxlen=0)
    return run.stopping.written
