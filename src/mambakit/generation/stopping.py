"""When a row ends, other than by its length."""

from collections.abc import Callable, Iterable, Sequence
from typing import Literal

from mambakit.models import MambaLM

from .sampling import is_whole
from .text_stream import TextStream, checked_strings

FinishReason = Literal["length", "stop_token", "stop_string"]
OnText = Callable[[int, str], None]


class Stopping:
    """Watch the tokens of all rows, and say which of them ends its row.

    Args:
        ends: For each row, the tokens that end it; the row keeps the one it ends with.
        texts: For each row, the text that its tokens make up, which knows its stop strings;
            ``None`` where there is no text.
        on_text: Called with a row and a piece of its text as soon as the piece is certain.
        goes_on: Whether a text that ends by its length may be taken up again, with the rest of
            a character that it has begun.
    """

    def __init__(
        self,
        ends: Sequence[frozenset[int]],
        texts: Sequence[TextStream] | None = None,
        on_text: OnText | None = None,
        *,
        goes_on: bool = False,
    ) -> None:
        self._ends = ends
        self._texts = texts
        self._on_text = on_text
        self._goes_on = goes_on
        self.written = [""] * len(ends)

    @property
    def blind(self) -> bool:
        """Whether no token can end a row, so that none needs to be looked at."""
        return self._texts is None and not any(self._ends)

    def look(self, row: int, token: int) -> FinishReason | None:
        """Take one more token of a row; say why the row ends, or ``None`` if it goes on."""
        if token in self._ends[row]:
            return "stop_token"
        if self._texts is not None:
            self._write(row, self._texts[row].push(token))
            if self._texts[row].stopped:
                return "stop_string"
        return None

    def close(self, row: int, reason: FinishReason) -> None:
        """Release the text that was held back: no more tokens of this row will come now."""
        if self._texts is not None:
            text = self._texts[row]
            later = self._goes_on and reason == "length"
            self._write(row, text.pause() if later else text.finish())

    def _write(self, row: int, piece: str) -> None:
        if piece:
            self.written[row] += piece
            if self._on_text is not None:
                self._on_text(row, piece)


def end_tokens(
    model: MambaLM, stop_tokens: Sequence[int] | Sequence[Sequence[int]], rows: int
) -> list[frozenset[int]]:
    """Return the set of end tokens of each row: the same for all, or one list for each.

    Raises:
        ValueError: A token is outside the vocabulary, or there are more or fewer lists than
            rows.
    """
    if not isinstance(stop_tokens, Iterable) or isinstance(stop_tokens, str):
        raise ValueError(f"generate: stop_tokens must be a list of ids, got {stop_tokens!r}")
    given = list(stop_tokens)
    lists = [each for each in given if isinstance(each, list | tuple | set | frozenset)]
    if not lists:
        return [_checked(model, given)] * rows
    if not len(lists) == len(given) == rows:
        raise ValueError(
            f"generate: stop_tokens must be one list, or one for each prompt, {rows}, "
            f"got {stop_tokens!r}"
        )
    return [_checked(model, each) for each in lists]


def stop_strings(stop: object, rows: int) -> list[tuple[str, ...]]:
    """Return the stop strings of each row: the same for all, or those of each.

    Raises:
        ValueError: One is empty or no string, or there are more or fewer lists than rows.
    """
    lists = list | tuple | set | frozenset
    if not isinstance(stop, lists) or not any(isinstance(each, lists) for each in stop):
        return [checked_strings(stop)] * rows
    if len(stop) != rows:
        raise ValueError(
            "generate: stop must be a string, strings for all rows, or as many for each prompt "
            f"as there are prompts, {rows}, got {stop!r}"
        )
    return [checked_strings(each) for each in stop]


def _checked(model: MambaLM, tokens: Iterable[object]) -> frozenset[int]:
    known = model.config.vocab_size
    ends = set()
    for token in tokens:
        if not is_whole(token) or not 0 <= token < known:
            raise ValueError(f"generate: stop_tokens must be in [0, {known}), got {token!r}")
        ends.add(int(token))
    return frozenset(ends)
