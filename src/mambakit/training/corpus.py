"""The text of a run: its documents, their tokenizer, and their tokens on disk."""

from pathlib import Path
from typing import NamedTuple

from mambakit.data import (
    Document,
    Shard,
    Splits,
    Tokenizer,
    find_documents,
    load_tokenizer,
    split_by_file,
    split_by_position,
    standard_library,
    write_shard,
)
from mambakit.data.text import expand

from .config import DataConfig, TokenizerConfig
from .run_folder import TOKENS


class Corpus(NamedTuple):
    """The text of a run.

    Attributes:
        splits: The documents of each part.
        tokenizer: What makes tokens of them.
        train: Tokens to learn from.
        validation: Tokens to score while learning, or ``None`` if there are none.
    """

    splits: Splits
    tokenizer: Tokenizer
    train: Shard
    validation: Shard | None


def find_splits(data: DataConfig) -> Splits:
    """Find the documents that ``[data]`` names and divide them."""
    documents = (
        standard_library()
        if data.source == "python-stdlib"
        else find_documents(data.files, data.patterns)
    )
    split = split_by_file if data.split == "file" else split_by_position
    return split(documents, data.validation, data.test)


def prepare_corpus(
    data: DataConfig,
    tokenizer: TokenizerConfig,
    folder: Path,
    *,
    made: Tokenizer | None = None,
) -> Corpus:
    """Read, divide and tokenize the text of a run.

    Args:
        data: Table ``[data]``.
        tokenizer: Table ``[tokenizer]``.
        folder: The run folder.
        made: The tokenizer of a run that is resumed; it takes the place of ``tokenizer``.

    Raises:
        ValueError: Text is missing, empty, or not what the tokenizer reads; see the
            functions of ``mambakit.data``.
        RuntimeError: The tokens cannot be written.
    """
    splits = find_splits(data)
    if made is None:
        # validation and test belong to the alphabet too: a character is no knowledge
        everything = (d for part in splits for d in part)
        made = load_tokenizer(tokenizer.kind, map(Document.read_text, everything))
    cache = expand(data.cache) if data.cache else folder / TOKENS
    train, validation = (
        write_shard(part, made, cache, name=name, separator=data.separator) if part else None
        for name, part in (("train", splits.train), ("validation", splits.validation))
    )
    if train is None:
        raise ValueError("data: the training part must hold text, got none")
    for name, share, part in (
        ("validation", data.validation, splits.validation),
        ("test", data.test, splits.test),
    ):
        if share and not part:
            raise ValueError(
                f"data: the {name} part must hold text, got none: enlarge data.{name}, or set "
                "it to 0 for none"
            )
    if validation is not None and len(validation.tokens) < 2:
        raise ValueError(
            "data: the validation part must hold at least 2 tokens, got 1: enlarge "
            "data.validation, or set it to 0 for none"
        )
    return Corpus(splits, made, train, validation)
