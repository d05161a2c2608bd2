"""Tokens on disk, read by memory map: written once for each text and tokenizer.

A shard is a folder:

    tokens.bin       the token ids, little-endian, in the narrowest unsigned type
    documents.npy    int64 (k + 1,): document i is tokens[documents[i] : documents[i + 1]]
    shard.json       sizes, the digest of the text and tokenizer it was made from, and those
                     of the two files above

Whoever opens a shard reads its files once and compares their digests: bits that rotted, or a
stranger who wrote into a shared cache, would otherwise be learnt as text. The text itself is
read and digested at every start too, which takes about as long.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mambakit._files import read_text, replacing

from .text import Document
from .tokenizers import Tokenizer

_FORMAT = 1
_TOKENS, _DOCUMENTS = _FILES = ("tokens.bin", "documents.npy")


@dataclass(frozen=True, eq=False)
class Shard:
    """The tokens of one split, mapped from disk.

    Attributes:
        tokens: Token ids ``(k,)``, of an unsigned type; reading a slice reads the disk.
        documents: Boundaries ``(documents + 1,)``, from 0 to ``k``.
        bytes: How many bytes of text the tokens stand for.
        digest: Changes with any byte of the text, any file name, and with the tokenizer.
        name: What to call the text in errors.
    """

    tokens: NDArray[np.unsignedinteger]
    documents: NDArray[np.int64]
    bytes: int
    digest: str
    name: str

    @property
    def tokens_per_byte(self) -> float:
        """How many tokens a byte of this text takes on average."""
        return len(self.tokens) / self.bytes


def _narrowest(vocab_size: int) -> np.dtype:
    for kind in ("<u1", "<u2", "<u4"):
        if vocab_size - 1 <= np.iinfo(kind).max:
            return np.dtype(kind)
    raise ValueError(f"data: vocab_size must be at most 2**32, got {vocab_size}")


def _digest(documents: Sequence[Document], tokenizer: Tokenizer, separator: str) -> str:
    seed = json.dumps([_FORMAT, tokenizer.to_json(), separator])
    digest = hashlib.sha256(seed.encode())
    for document in documents:
        data = document.read()
        digest.update(json.dumps([document.name, len(data)]).encode())
        digest.update(data)
    return digest.hexdigest()


def encode_document(
    document: Document, tokenizer: Tokenizer, separator: str = ""
) -> NDArray[np.int64]:
    """Turn a document, and the separator that follows it, into token ids.

    Raises:
        ValueError: The file cannot be read, or the tokenizer cannot read it; it is named.
    """
    text = document.read() if tokenizer.reads_bytes else document.read_text()
    try:
        ids = tokenizer.encode(text)
    except ValueError as error:
        raise ValueError(f"{document.path}: {error}") from error
    if separator:
        try:
            ids = np.concatenate([ids, tokenizer.encode(separator)])
        except ValueError as error:
            raise ValueError(f"data: separator {separator!r}: {error}") from error
    if len(ids) and not 0 <= ids.min() <= ids.max() < tokenizer.vocab_size:
        raise ValueError(
            f"{document.path}: token ids must be below the vocabulary's size "
            f"{tokenizer.vocab_size}, got {ids.min()} to {ids.max()}"
        )
    return ids


def write_shard(
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    cache: Path,
    *,
    name: str = "text",
    separator: str = "",
) -> Shard:
    """Tokenize ``documents`` into a shard below ``cache``, or map the one that is there.

    Args:
        documents: The text, in order, laid end to end.
        tokenizer: What makes tokens of it.
        cache: The folder that holds shards. Runs may share one.
        name: What to call this split, in the folder's name and in errors.
        separator: Text that follows every document, such as ``"<|endoftext|>"``. Its bytes
            count as text.

    Returns:
        The mapped shard. One document at a time is held in memory while it is written.

    Raises:
        ValueError: There is no text, a file cannot be read, or the tokenizer cannot read
            it; the file is named.
        RuntimeError: ``cache`` cannot be written, or holds a shard that is not as it was
            written; the sentence says what to do.
    """
    digest = _digest(documents, tokenizer, separator)
    folder = cache / f"{name}-{digest[:16]}"
    if not folder.exists():
        try:
            with replacing(folder) as temporary:
                temporary.mkdir()
                _write(temporary, documents, tokenizer, separator, digest, name)
        except RuntimeError:
            # another run that shares the cache may have put the same shard there meanwhile
            if not folder.exists():
                raise
    return _open_shard(folder, digest, name)


def _write(
    folder: Path,
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    separator: str,
    digest: str,
    name: str,
) -> None:
    dtype = _narrowest(tokenizer.vocab_size)
    ends = [0]
    with (folder / _TOKENS).open("wb") as file:
        for document in documents:
            ids = encode_document(document, tokenizer, separator)
            file.write(ids.astype(dtype).tobytes())
            ends.append(ends[-1] + len(ids))
    if ends[-1] == 0:
        raise ValueError(f"data: the {name} text must hold at least one token, got none")
    np.save(folder / _DOCUMENTS, np.array(ends, dtype=np.int64))
    record = {
        "format": _FORMAT,
        "digest": digest,
        "dtype": dtype.str,
        "tokens": ends[-1],
        "bytes": sum(d.size for d in documents) + len(documents) * len(separator.encode()),
        "tokenizer": tokenizer.name,
        "sha256": {name: _file_digest(folder / name) for name in _FILES},
    }
    (folder / "shard.json").write_text(json.dumps(record, indent=2), encoding="utf-8")


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _open_shard(folder: Path, digest: str, name: str) -> Shard:
    again = f"delete the folder {folder} and it is written again"
    file = folder / "shard.json"
    try:
        record = json.loads(read_text(file, "token shard"))
        dtype, count, size = np.dtype(record["dtype"]), record["tokens"], record["bytes"]
        digests = {name: record["sha256"][name] for name in _FILES}
        ours = record["digest"] == digest and size > 0 and count > 0 and dtype.kind == "u"
    except (ValueError, KeyError, TypeError) as error:
        raise RuntimeError(
            f"data: {file} must be whole, got one that is damaged ({error!r}): {again}"
        ) from error
    if not ours:
        raise RuntimeError(f"data: {file} must describe the text, got another's: {again}")

    for name_of_file, written in digests.items():
        file = folder / name_of_file
        try:
            found = _file_digest(file)
        except OSError as error:
            raise RuntimeError(
                f"data: cannot read {file}: {error.strerror or error}: {again}"
            ) from error
        if found != written:
            raise RuntimeError(
                f"data: {file} must be as it was written, got one that was changed or cut: "
                f"{again}"
            )
    if (folder / _TOKENS).stat().st_size != count * dtype.itemsize:
        raise RuntimeError(
            f"data: {folder / 'shard.json'} must describe the tokens beside it, got another "
            f"number or type of them: {again}"
        )
    tokens = np.memmap(folder / _TOKENS, dtype=dtype, mode="r")
    documents = np.load(folder / _DOCUMENTS)
    return Shard(tokens=tokens, documents=documents, bytes=size, digest=digest, name=name)
