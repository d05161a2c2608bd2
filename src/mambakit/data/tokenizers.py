"""Text to token ids and back: bytes, characters, or any ``tokenizers`` JSON file."""

import difflib
import json
import operator
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from mambakit._files import read_text, replacing

Ids = NDArray[np.int64]

KINDS = ("byte", "character")
"""The tokenizers that need no file."""


@runtime_checkable
class Tokenizer(Protocol):
    """What training, generation and evaluation ask of a tokenizer.

    The law that every tokenizer here keeps on text it can represent:
    ``decode(encode(text)) == text``.
    """

    name: str
    vocab_size: int
    reads_bytes: bool
    """Whether ``encode`` takes bytes of any kind, and not only those of UTF-8."""

    def encode(self, text: str | bytes) -> Ids:
        """Turn text, or the bytes of a UTF-8 file, into token ids ``(k,)`` int64."""
        ...

    def decode_bytes(self, ids: Sequence[int] | Ids) -> bytes:
        """Turn token ids back into bytes, which may stop in the middle of a character."""
        ...

    def decode(self, ids: Sequence[int] | Ids) -> str:
        """Turn token ids back into text; bytes that are not UTF-8 become U+FFFD."""
        ...

    def to_json(self) -> str:
        """Write the tokenizer as text from which ``load_tokenizer`` makes it again."""
        ...


def _as_text(text: str | bytes, name: str) -> str:
    if isinstance(text, str):
        return text
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name} tokenizer: text must be UTF-8, got the byte "
            f"0x{error.object[error.start]:02x} at offset {error.start}"
        ) from error


def _as_bytes(text: str | bytes, name: str) -> bytes:
    if isinstance(text, bytes):
        return text
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} tokenizer: text must be encodable as UTF-8, got a lone surrogate "
            f"at position {error.start}"
        ) from error


def _checked(ids: Sequence[int] | Ids, vocab_size: int, name: str) -> list[int]:
    """Return ids as Python's numbers, which an array does not hold."""
    whole = list(map(operator.index, ids))
    for i in whole:
        if not 0 <= i < vocab_size:
            raise ValueError(f"{name} tokenizer: ids must be in [0, {vocab_size}), got {i}")
    return whole


class ByteTokenizer:
    """Read every byte as a token: 256 of them, no training, no unknown text.

    Example:
        >>> tokenizer = ByteTokenizer()
        >>> tokenizer.encode("né").tolist()
        [110, 195, 169]
        >>> tokenizer.decode(tokenizer.encode("né"))
        'né'
    """

    name = "byte"
    vocab_size = 256
    reads_bytes = True

    def encode(self, text: str | bytes) -> Ids:
        return np.frombuffer(_as_bytes(text, self.name), dtype=np.uint8).astype(np.int64)

    def decode_bytes(self, ids: Sequence[int] | Ids) -> bytes:
        return bytes(_checked(ids, self.vocab_size, self.name))

    def decode(self, ids: Sequence[int] | Ids) -> str:
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def to_json(self) -> str:
        return json.dumps({"kind": "byte"})


class CharacterTokenizer:
    """Read every character of a fixed alphabet as a token, numbered in code-point order.

    Args:
        characters: The alphabet. Its order and repetitions do not matter.

    Raises:
        ValueError: The alphabet is empty.

    Example:
        >>> tokenizer = CharacterTokenizer("to be or not")
        >>> tokenizer.vocab_size
        7
        >>> tokenizer.decode(tokenizer.encode("boot"))
        'boot'
    """

    name = "character"
    reads_bytes = False

    def __init__(self, characters: str) -> None:
        if not characters:
            raise ValueError("CharacterTokenizer: characters must not be empty, got ''")
        self.characters = "".join(sorted(set(characters)))
        self.vocab_size = len(self.characters)
        self._code_points = np.array([ord(c) for c in self.characters], dtype=np.uint32)

    @classmethod
    def from_texts(cls, texts: Iterable[str | bytes]) -> "CharacterTokenizer":
        """Collect the alphabet of all ``texts``; bytes must be UTF-8 (else ValueError)."""
        seen: set[str] = set()
        for text in texts:
            seen.update(_as_text(text, cls.name))
        return cls("".join(seen))

    def encode(self, text: str | bytes) -> Ids:
        text = _as_text(text, self.name)
        # surrogatepass, so that a lone surrogate is reported as unknown like any other
        points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
        ids = np.searchsorted(self._code_points, points)
        known = self._code_points[np.minimum(ids, self.vocab_size - 1)] == points
        if not known.all():
            at = int(np.argmin(known))
            raise ValueError(
                f"character tokenizer: text must use the {self.vocab_size} characters of "
                f"the training text, got {text[at]!r} at position {at}"
            )
        return ids.astype(np.int64)

    def decode(self, ids: Sequence[int] | Ids) -> str:
        known = _checked(ids, self.vocab_size, self.name)
        return "".join(self.characters[i] for i in known)

    def decode_bytes(self, ids: Sequence[int] | Ids) -> bytes:
        return self.decode(ids).encode("utf-8", "surrogatepass")

    def to_json(self) -> str:
        return json.dumps({"kind": "character", "characters": self.characters})


def _byte_alphabet() -> dict[str, int]:
    """The printable character that stands for each byte in a byte-level BPE vocabulary.

    Bytes that print stand for themselves; the other 68 take code points from 256 on, in
    order (the published GPT-2 convention).
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + i): byte for i, byte in enumerate(hidden)
    }


def _is_byte_level(decoder: Any) -> bool:
    """Whether the ``decoder`` of a tokenizer file maps characters back to single bytes."""
    if not isinstance(decoder, dict):
        return False
    inner = decoder.get("decoders", [])
    return decoder.get("type") == "ByteLevel" or any(_is_byte_level(d) for d in inner)


class JsonTokenizer:
    """Read text with a tokenizer that the ``tokenizers`` library wrote as JSON.

    Args:
        definition: The text of the JSON file.
        source: What to call it in errors.

    Raises:
        ValueError: ``definition`` is not such a file.
        RuntimeError: The ``tokenizers`` package is not installed.
    """

    name = "json"
    reads_bytes = False

    def __init__(self, definition: str, source: str = "tokenizer.json") -> None:
        try:
            import tokenizers  # an extra, needed only for such files
        except ImportError as error:
            raise RuntimeError(
                f"load_tokenizer: {source} needs tokenizers: pip install 'mambakit[tokenizers]'"
            ) from error
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(definition)
        # the library raises bare Exception for every malformed file, and nothing narrower
        except Exception as error:
            raise ValueError(
                f"load_tokenizer: {source} must be a tokenizers JSON file, got {error}"
            ) from error
        self._definition = definition
        self.vocab_size = self._highest_id() + 1
        self._bytes = (
            _byte_alphabet() if _is_byte_level(json.loads(definition).get("decoder")) else None
        )
        self._special = set(self._tokenizer.get_added_tokens_decoder())

    def _highest_id(self) -> int:
        # the number of entries is too small where a vocabulary has gaps
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)

    def encode(self, text: str | bytes) -> Ids:
        _as_bytes(text, self.name)  # a lone surrogate would be an error of the library's own
        text = _as_text(text, self.name)
        try:
            encoding = self._tokenizer.encode(text, add_special_tokens=False)
        # of a text that the definition has no tokens for the library raises bare Exception too
        except Exception as error:
            raise ValueError(
                f"{self.name}: the text must be one that it knows, {error}"
            ) from error
        return np.array(encoding.ids, dtype=np.int64)

    def decode(self, ids: Sequence[int] | Ids) -> str:
        known = _checked(ids, self.vocab_size, self.name)
        return self._tokenizer.decode(known, skip_special_tokens=False)

    def decode_bytes(self, ids: Sequence[int] | Ids) -> bytes:
        if self._bytes is None:
            return self.decode(ids).encode("utf-8")
        pieces = []
        for i in _checked(ids, self.vocab_size, self.name):
            token = self._tokenizer.id_to_token(i)
            if token is None:  # a gap of the vocabulary decodes to nothing, as in decode
                continue
            if i in self._special or any(c not in self._bytes for c in token):
                pieces.append(token.encode("utf-8"))
            else:
                pieces.append(bytes(self._bytes[c] for c in token))
        return b"".join(pieces)

    def to_json(self) -> str:
        return self._definition


def load_tokenizer(spec: str, texts: Iterable[str | bytes] = ()) -> Tokenizer:
    """Make the tokenizer that ``spec`` names.

    Args:
        spec: ``"byte"``; ``"character"``, whose alphabet is that of ``texts``; or the path
            of a JSON file, written by the ``tokenizers`` library or by ``save_tokenizer``.
        texts: Where ``"character"`` finds its alphabet; not read for anything else.

    Raises:
        ValueError: ``spec`` is neither a kind nor a file (the nearest kind is named), the file
            is not a tokenizer, or ``texts`` is empty for ``"character"``.
        RuntimeError: The file needs the ``tokenizers`` package, and it is not installed.

    Example:
        >>> load_tokenizer("character", ["abc"]).encode("cab").tolist()
        [2, 0, 1]
    """
    if spec == "byte":
        return ByteTokenizer()
    if spec == "character":
        return CharacterTokenizer.from_texts(texts)
    path = Path(spec)
    if not path.suffix and not os.path.exists(path):
        near = difflib.get_close_matches(path.name, KINDS, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(
            f"load_tokenizer: a tokenizer must be {', '.join(KINDS)} or a JSON file, got "
            f"{path.name!r}, and there is no file {path}{hint}"
        )
    definition = read_text(path, "tokenizer")
    try:
        record = json.loads(definition)
    except (ValueError, RecursionError) as error:  # the latter of brackets too deep
        raise ValueError(f"load_tokenizer: {path} must be JSON, got {error}") from error
    match record:
        case {"kind": "byte"}:
            return ByteTokenizer()
        case {"kind": "character", "characters": str(characters)}:
            return CharacterTokenizer(characters)
        case _:
            return JsonTokenizer(definition, str(path))


def save_tokenizer(tokenizer: Tokenizer, path: Path) -> None:
    """Write ``tokenizer`` to a JSON file that ``load_tokenizer`` reads.

    Raises:
        RuntimeError: The file cannot be written.
    """
    with replacing(path) as temporary:
        temporary.write_text(tokenizer.to_json(), encoding="utf-8")
