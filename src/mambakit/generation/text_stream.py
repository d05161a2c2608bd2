"""Tokens to text as they come: whole characters, and an end before a stop string."""

import codecs
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from mambakit.data import Tokenizer

_REPLACEMENT = "\ufffd".encode()
_LONGEST_CHARACTER = 4
# What is decided here looks back at the tokens of an unfinished character, which are fewer than
# the longest has, and at those of the character before it.
_REACH = 2 * _LONGEST_CHARACTER


class _Context(NamedTuple):
    """Tokens that stand before the next ones, and what they are alone."""

    tokens: list[int]
    data: bytes


class TextStream:
    r"""Turn tokens into text as they come, and end it before a stop string.

    A character whose bytes are spread over tokens appears with the last of them; bytes that
    are not UTF-8 become U+FFFD. Text that may be the beginning of a stop string is held back
    until it is known whether it is one, wherever tokens begin and end.

    The text is what the tokens add to those ``before`` them: the space between two words, and
    the whole of a character that those have only begun. A copy (``copy.copy``) goes on by
    itself.

    Args:
        tokenizer: Turns token ids into bytes.
        stop: A string that ends the text, or several; none of them appears in it.
        before: The last tokens before the first that is pushed, as many as are known. Eight are
            enough for all but stop strings.
        written: How many of those belong to the same text, in which a stop string may begin.
            What is already out stays out: such a text ends where it stands.
        whole: Whether ``before`` is known to end with a whole character.

    Raises:
        ValueError: A stop string is empty or no string.

    Example:
        >>> from mambakit.data import ByteTokenizer
        >>> text = TextStream(ByteTokenizer(), stop=["END"])
        >>> [text.push(token) for token in "né ENDLESS".encode()]
        ['n', '', 'é', ' ', '', '', '', '', '', '', '']
        >>> text.stopped
        True
        >>> TextStream(ByteTokenizer(), before=b"n\xc3").push(0xA9)
        'é'
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: str | Sequence[str] = (),
        *,
        before: Sequence[int] = (),
        written: int = 0,
        whole: bool = False,
    ) -> None:
        strings = checked_strings(stop)
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop: tuple[str, ...] = ()
        self._longest = 1
        self._held = self._given = ""
        # a text without stop strings has no use for what it has already said
        first = max(0, len(before) - written) if strings else len(before)
        self._last = list(before[:first])[-_REACH:]
        begun, self._context = self._settle()
        if whole and begun:
            begun, self._context = 0, _Context(self._last, tokenizer.decode_bytes(self._last))
        at = len(self._last) - begun
        self._pending = self._last[at:]
        known = b"" if whole else tokenizer.decode_bytes(self._last[:at])
        self._bytes = known[codecs.utf_8_decode(known, "replace", False)[1] :]
        said = "".join(map(self.push, before[first:]))
        self._stop, self._longest = strings, max(map(len, strings), default=1)
        self._given = said[len(said) - self._begun(said) :]

    def push(self, token: int) -> str:
        """Take one more token; return the text that is certain now, which may be empty."""
        if self.stopped:
            return ""
        self._last = [*self._last[1 - _REACH :], token]
        self._pending = [*self._pending, token]
        begun, context = self._settle()
        ready = len(self._pending) - begun
        text = self._decode(ready, final=False)
        if ready > 0:
            self._pending, self._context = self._pending[ready:], context
        return self._release(text, last=False)

    def pause(self) -> str:
        """Return what was held back as the beginning of a stop string, and none has come.

        The text may go on: a stream of the tokens after these, which is told of them, will
        have the rest of a character that they have begun.
        """
        return "" if self.stopped else self._release("", last=True)

    def finish(self) -> str:
        """Return all that was held back, now that no more tokens will come."""
        if self.stopped:
            return ""
        text = self._decode(len(self._pending), final=True)
        self._pending = []
        return self._release(text, last=True)

    def _decode(self, count: int, final: bool) -> str:
        """Return the characters that the first ``count`` of the pending tokens complete.

        Tokenizers that do not work on bytes decode a token by what stands before it (a space,
        the rest of a character), so the tokens decoded last are decoded along with them.
        """
        data = self._bytes
        if count > 0:
            known, more = len(self._context.data), self._context.tokens + self._pending[:count]
            data += self._tokenizer.decode_bytes(more)[known:]
        text, used = codecs.utf_8_decode(data, "replace", final)
        self._bytes = data[used:]
        return text

    def _settle(self) -> tuple[int, _Context]:
        """Return how many of the last tokens seem to have begun a character, and their context.

        It is a function of the last few tokens, so that it does not matter who asks, and when.
        """
        last = self._last
        for count in range(min(_LONGEST_CHARACTER, len(last) + 1)):
            context = self._nearest(last[: len(last) - count])
            if context is None:
                continue
            # such a token is shown as one replacement; fewer of them have a text of their own
            begun = last[len(last) - count :]
            if count and self._tokenizer.decode_bytes(begun) != _REPLACEMENT * count:
                break
            return count, context
        garbage = last[-_LONGEST_CHARACTER:]  # which will not become text
        return 0, _Context(garbage, self._tokenizer.decode_bytes(garbage))

    def _nearest(self, tokens: list[int]) -> _Context | None:
        """Return the fewest of the last tokens that show how the next one is decoded.

        They end with the end of a character; ``None`` means that the tokens do not.
        """
        silent = None if tokens else _Context([], b"")
        for k in range(1, min(_LONGEST_CHARACTER, len(tokens)) + 1):
            some = tokens[-k:]
            data = self._tokenizer.decode_bytes(some)
            if data.endswith(_REPLACEMENT):
                continue
            if data:
                return _Context(some, data)
            # a decoder may take what follows these for the beginning of a text
            silent = silent or _Context(some, data)
        return silent

    def _release(self, text: str, last: bool) -> str:
        """Return what of the text is certain to be no part of a stop string."""
        whole = self._given + self._held + text
        given = len(self._given)
        ends = [whole.find(one, max(0, given + 1 - len(one))) for one in self._stop]
        found = [at for at in ends if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return whole[given : max(given, min(found))]
        begun = self._begun(whole)
        end = len(whole) - (0 if last else min(begun, len(whole) - given))
        self._held = whole[end:]
        # only what a stop string may have begun with is of any use when more comes
        self._given = whole[len(whole) - begun : end]
        return whole[given:end]

    def _begun(self, text: str) -> int:
        """Return how many characters at the end of ``text`` may begin a stop string."""
        for k in range(min(self._longest - 1, len(text)), 0, -1):
            if any(string.startswith(text[-k:]) for string in self._stop):
                return k
        return 0


def checked_strings(stop: object) -> tuple[str, ...]:
    """Return stop strings, given as one or several, as a tuple.

    Raises:
        ValueError: One of them is empty, or they are something else.
    """
    strings = (stop,) if isinstance(stop, str) else stop
    if isinstance(strings, bytes) or not isinstance(strings, Iterable):
        raise ValueError(f"generate: stop must be a string or a list of them, got {stop!r}")
    several = tuple(strings)
    for string in several:
        if not isinstance(string, str):
            raise ValueError(f"generate: stop strings must be strings, got {string!r}")
        if not string:
            raise ValueError("generate: stop strings must not be empty, got ''")
    return several
