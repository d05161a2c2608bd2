"""Tokens to text as they come: whole characters, and an end before a stop string."""

import codecs
from collections.abc import Sequence

from mambakit.data import Tokenizer

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
