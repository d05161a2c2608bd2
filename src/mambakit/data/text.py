"""Where text comes from, and which part of it is for training, validation and test."""

import glob
import hashlib
import os
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path, PurePath
from typing import NamedTuple


@dataclass(frozen=True)
class Document:
    """A run of bytes of one file, read when it is asked for.

    Attributes:
        name: What the document is called wherever it lies: its path below the folder it
            was found in, with forward slashes.
        path: The file.
        start: First byte.
        stop: One past the last byte.
    """

    name: str
    path: Path
    start: int
    stop: int

    @property
    def size(self) -> int:
        """Length in bytes."""
        return self.stop - self.start

    def read(self) -> bytes:
        """Read the bytes.

        Raises:
            ValueError: The file is gone, cannot be read, or has become shorter.
        """
        try:
            with self.path.open("rb") as file:
                file.seek(self.start)
                data = file.read(self.size)
        except OSError as error:
            raise ValueError(f"cannot read {self.path}: {error.strerror or error}") from error
        if len(data) != self.size:
            raise ValueError(
                f"{self.path} must hold at least {self.stop} bytes, got "
                f"{self.start + len(data)}: it was cut while it was in use"
            )
        return data

    def read_text(self) -> str:
        """Read the bytes as UTF-8.

        Raises:
            ValueError: They are not UTF-8; the sentence names the file and the byte's offset.
                Or see ``read``.
        """
        data = self.read()
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{self.path} must be UTF-8, got the byte 0x{data[error.start]:02x} "
                f"at offset {self.start + error.start}"
            ) from error


class Splits(NamedTuple):
    """The documents for training, validation and test; the last two may be empty."""

    train: tuple[Document, ...]
    validation: tuple[Document, ...]
    test: tuple[Document, ...]


def _document(name: str, path: Path) -> Document:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from error
    return Document(name=name, path=path, start=0, stop=size)


def _below(folder: Path, paths: Iterable[Path]) -> Iterator[Document]:
    named = ((path.relative_to(folder).as_posix(), path) for path in paths)
    for name, path in sorted(named):
        if path.is_file():
            yield _document(name, path)


def expand(place: str) -> Path:
    """Make a path of ``place``, whose ``~`` or ``~name`` becomes the home folder.

    Raises:
        ValueError: There is no such home folder, or ``place`` is no path.
    """
    if not place or "\0" in place:
        raise ValueError(f"data: a path must be some text without NUL, got {place!r}")
    try:
        return Path(place).expanduser()
    except RuntimeError as error:
        raise ValueError(f"data: {place} must begin with a home folder, got none") from error


def _check_pattern(pattern: str) -> None:
    path = PurePath(pattern)
    if not path.name or path.anchor or ".." in path.parts:
        raise ValueError(f"data: a pattern must name files below the folder, got {pattern!r}")
    if any("**" in part and part != "**" for part in path.parts):
        raise ValueError(f"data: ** must be a whole part of a pattern, got {pattern!r}")


def find_documents(
    places: Sequence[str], patterns: Sequence[str] = ("*.txt",)
) -> tuple[Document, ...]:
    """List the text files at ``places``, in the order given, and by name within a folder.

    Args:
        places: Each is a file, a folder that is searched through and through, or a glob
            such as ``"books/**/*.md"``. Empty files of a folder or glob are passed over.
        patterns: Which files of a folder count.

    Raises:
        ValueError: A place does not exist, holds no such file, or has no text in it; or a
            pattern is none, or leaves the folder.
    """
    if not patterns:
        raise ValueError("data: patterns must name at least one, got none")
    for pattern in patterns:
        _check_pattern(pattern)
    documents: list[Document] = []
    for place in places:
        path = expand(place)
        if path.is_dir():
            found = list(_below(path, {p for pattern in patterns for p in path.rglob(pattern)}))
            if not found and "*" in patterns:
                raise ValueError(f"data: the folder {place} must hold files, got none")
            if not found:
                raise ValueError(
                    f"data: the folder {place} must hold files named {' or '.join(patterns)}, "
                    "got none: data.patterns says which files count"
                )
        elif path.is_file():
            found = [_document(path.name, path)]
            if found[0].size == 0:
                raise ValueError(f"data: {place} must hold text, got an empty file")
        elif glob.has_magic(place):
            paths = [Path(p) for p in glob.glob(str(path), recursive=True) if os.path.isfile(p)]
            if not paths:
                raise ValueError(f"data: the pattern {place} must match a file, got none")
            common = Path(os.path.commonpath([p.parent for p in paths]))
            found = list(_below(common, paths))
        elif path.exists():  # a pipe, say: text is read more than once
            raise ValueError(f"data: {place} must be a regular file or a folder")
        else:
            raise ValueError(f"data: there is no file or folder {place}")
        documents.extend(found)
    filled = tuple(document for document in documents if document.size)
    if not filled:
        raise ValueError(f"data: {', '.join(places)} must hold text, got only empty files")
    return filled


# Tests repeat the same idioms thousands of times, pydoc_data is the reference manual as one
# long string, and what pip installed differs from machine to machine: none of them says how
# well a model has learnt Python.
_LEFT_OUT = {
    "test",
    "tests",
    "idle_test",
    "pydoc_data",
    "site-packages",
    "dist-packages",
    "__pycache__",
}


def standard_library() -> tuple[Document, ...]:
    """List the running Python's own ``*.py`` sources by path, without its tests.

    Raises:
        RuntimeError: This Python came without its sources (an embedded or zipped one).
    """
    folder = Path(sysconfig.get_path("stdlib"))
    sources = (
        path
        for path in folder.rglob("*.py")
        if not _LEFT_OUT.intersection(path.relative_to(folder).parts)
    )
    documents = tuple(document for document in _below(folder, sources) if document.size)
    if not documents:
        raise RuntimeError(f"data: there are no sources of the standard library in {folder}")
    return documents


def _check_shares(validation: float, test: float) -> None:
    if not (validation >= 0 and test >= 0 and validation + test < 1):
        raise ValueError(
            "data: validation and test must be shares of the text, at least 0 and below 1 "
            f"together, got {validation} and {test}"
        )


def split_by_file(
    documents: Sequence[Document], validation: float = 0.05, test: float = 0.05
) -> Splits:
    """Send each whole file to one split by a hash of its name, and mix their order.

    A file's split depends on nothing but its name: it is the same on every machine, and
    stays when other files come or go. The shares are therefore kept on average only. The order
    within a split is that of another hash of the name, so that files of one folder, which are
    alike, do not follow each other.

    Args:
        documents: The files.
        validation: Share of the files for validation.
        test: Share of the files for the test.

    Raises:
        ValueError: The shares are out of range, or a split that should hold files has
            none.
    """
    _check_shares(validation, test)
    parts: tuple[list[Document], list[Document], list[Document]] = ([], [], [])
    digests = [
        hashlib.sha256(document.name.encode("utf-8", "surrogateescape")).digest()
        for document in documents
    ]
    mixed = sorted(zip(digests, documents, strict=True), key=lambda pair: pair[0][8:])
    for digest, document in mixed:
        place = int.from_bytes(digest[:8], "big") / 2**64  # uniform in [0, 1)
        parts[1 if place < validation else 2 if place < validation + test else 0].append(
            document
        )
    for name, share, part in zip(
        Splits._fields, (1 - validation - test, validation, test), parts, strict=True
    ):
        if share > 0 and not part:
            raise ValueError(
                f"data: the split by file must give the {name} split a file, got none of "
                f"{len(documents)}; split = 'position' cuts inside files"
            )
    return Splits(*(tuple(part) for part in parts))


def _character_start(document: Document, cut: int) -> int:
    """Move ``cut`` back to the first byte of the UTF-8 character it falls into."""
    around = Document(document.name, document.path, max(document.start, cut - 3), cut + 1)
    data = around.read()
    back = 0
    while back < 3 and back + 1 < len(data) and 0x80 <= data[-1 - back] <= 0xBF:
        back += 1
    return cut - back


def split_by_position(
    documents: Sequence[Document], validation: float = 0.05, test: float = 0.05
) -> Splits:
    """Cut the text, all documents end to end, into a first, a middle and a last part.

    The first part is for training, the last for the test (or for validation where
    ``test`` is 0): with ``validation=0.1, test=0`` the usual convention for tiny
    Shakespeare. A cut never falls inside a UTF-8 character.

    Args:
        documents: The files, in order.
        validation: Share of the bytes for validation.
        test: Share of the bytes for the test.

    Raises:
        ValueError: The shares are out of range.
    """
    _check_shares(validation, test)
    total = sum(document.size for document in documents)
    # the small term undoes the rounding of 1 - 0.1 in binary, so that 0.9 n is exact
    train_end = int(total * (1 - validation - test) + 1e-6)
    test_start = int(total * (1 - test) + 1e-6)

    parts: tuple[list[Document], list[Document], list[Document]] = ([], [], [])
    before = 0  # bytes of all earlier documents
    for document in documents:
        edges = [document.start]
        for cut in (train_end, test_start):
            at = document.start + min(max(cut - before, 0), document.size)
            inside = document.start < at < document.stop
            at = _character_start(document, at) if inside else at
            edges.append(max(at, edges[-1]))
        edges.append(document.stop)
        for part, (start, stop) in zip(parts, pairwise(edges), strict=True):
            if start < stop:
                part.append(Document(document.name, document.path, start, stop))
        before += document.size
    return Splits(*(tuple(part) for part in parts))
