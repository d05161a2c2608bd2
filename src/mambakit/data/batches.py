"""Batches of tokens from one long text, in an order that a seed fixes and a resume keeps."""

from abc import ABC, abstractmethod
from numbers import Integral
from typing import NamedTuple, Protocol, TypeGuard

import numpy as np
import torch
from jaxtyping import Bool, Int
from numpy.typing import NDArray
from torch import Tensor

NO_TARGET = -100
"""What stands for a target where none is wanted; PyTorch's own losses pass over it too."""


class Batch(NamedTuple):
    """Inputs, what follows each of them, and whether the state starts anew.

    Attributes:
        inputs: Tokens, int64.
        targets: The token after each input; ``NO_TARGET`` after the last of a document, where
            documents are told apart.
        fresh: ``True`` where the rows do not continue those of the batch before, so that
            the model must start from no state.
        starts: Which inputs are the first of a document, so that the model must start from no
            state there too; ``None`` where documents are one text.
    """

    inputs: Int[Tensor, "b l"]
    targets: Int[Tensor, "b l"]
    fresh: bool
    starts: Bool[Tensor, "b l"] | None = None


def find_starts(
    documents: NDArray[np.int64], begins: NDArray[np.int64], length: int
) -> Bool[Tensor, "b l"]:
    """Say which tokens of the windows that begin at ``begins`` are the first of a document.

    Example:
        >>> find_starts(np.array([0, 3, 4, 9]), np.array([2, 0]), length=4)
        tensor([[False,  True,  True, False],
                [ True, False, False,  True]])
    """
    starts = np.zeros((len(begins), length), dtype=bool)
    for row, begin in zip(starts, begins, strict=True):
        some = slice(*np.searchsorted(documents, (begin, begin + length)))
        row[documents[some] - begin] = True
    return torch.from_numpy(starts)


def _is_whole(value: object) -> TypeGuard[int]:
    return isinstance(value, Integral) and not isinstance(value, bool)


class Batches(Protocol):
    """An endless source of batches whose place is a small value."""

    def next(self) -> Batch:
        """Take the next batch."""
        ...

    def state_dict(self) -> dict[str, int]:
        """Give the place in the sequence of batches, as numbers that JSON can hold."""
        ...

    def load_state_dict(self, place: dict[str, int]) -> None:
        """Go to a place that ``state_dict`` gave."""
        ...


class _Epochs(ABC):
    """Batches whose place is an epoch and a position in it: what both kinds have in common.

    The text of an epoch begins at an offset that ``(seed, epoch)`` alone decides, and so does
    all else that is drawn for the epoch.
    """

    _rows: str
    """What a row of a batch is called in errors."""

    def __init__(
        self,
        tokens: NDArray,
        *,
        batch_size: int,
        length: int,
        seed: int,
        name: str = "training",
        documents: NDArray[np.int64] | None = None,
    ) -> None:
        kind = type(self).__name__
        for argument, value, least in (
            ("batch_size", batch_size, 1), ("length", length, 1), ("seed", seed, 0)
        ):  # fmt: skip
            if not _is_whole(value) or value < least:
                raise ValueError(
                    f"{kind}: {argument} must be a whole number of at least {least}, "
                    f"got {value!r}"
                )
        batch_size, length, seed = int(batch_size), int(length), int(seed)
        if documents is not None and (
            [*documents[:1], *documents[-1:]] != [0, len(tokens)]
            or np.any(documents[1:] < documents[:-1])
        ):
            raise ValueError(
                f"{kind}: documents must be boundaries that rise from 0 to {len(tokens)}, the "
                f"number of tokens, got {documents}"
            )
        if documents is not None and not np.any(np.diff(documents) > 1):
            raise ValueError(
                f"{kind}: documents must have one of two tokens or more, as the first of a "
                f"document is no target, got none in the {name} text"
            )
        # a batch of more windows than the text has would hold some of them several times
        needed = batch_size * length + 1
        if len(tokens) < needed:
            raise ValueError(
                f"{kind}: the {name} text must hold {batch_size} {self._rows} of length "
                f"{length} and one token more ({needed} tokens), got {len(tokens)}: reduce "
                "batch_size or length"
            )
        self._tokens, self._batch_size, self._length = tokens, batch_size, length
        self._seed, self._documents = seed, documents
        self._go_to(epoch=0, position=0)

    def _go_to(self, epoch: int, position: int) -> None:
        self._epoch, self._position = epoch, position
        self._windows = self._draw(np.random.default_rng([self._seed, epoch]))

    @abstractmethod
    def _draw(self, random: np.random.Generator) -> int:
        """Draw what the epoch needs, and say how many positions it has."""

    def _draw_offset(self, random: np.random.Generator, rows: int) -> int:
        """Draw where the text begins so that ``rows`` windows, and a target more, are left."""
        spare = len(self._tokens) - 1 - rows * self._length
        return int(random.integers(0, min(self._length, spare + 1)))

    def _read(self, begins: NDArray[np.int64], fresh: bool) -> Batch:
        """Read the windows that begin at these places of the text."""
        size = self._length + 1
        rows = np.empty((len(begins), size), dtype=np.int64)
        for row, begin in zip(rows, begins, strict=True):
            row[:] = self._tokens[begin : begin + size]
        whole = torch.from_numpy(rows)
        inputs, targets = whole[:, :-1], whole[:, 1:]
        if self._documents is None:
            return Batch(inputs, targets, fresh)
        starts = find_starts(self._documents, begins, size)
        targets = targets.masked_fill(starts[:, 1:], NO_TARGET)
        return Batch(inputs, targets, fresh, starts[:, :-1])

    def state_dict(self) -> dict[str, int]:
        """Give the epoch and the number of windows taken from it."""
        return {"epoch": self._epoch, "position": self._position}

    def load_state_dict(self, place: dict[str, int]) -> None:
        """Go to a place that ``state_dict`` gave; text, sizes and seed must be the same.

        Where batches continue, the model's state belongs to the place too, and the caller
        keeps it.

        Raises:
            ValueError: There is no such place.
        """
        kind = type(self).__name__
        if (
            not isinstance(place, dict)
            or place.keys() != {"epoch", "position"}
            or not all(_is_whole(number) and number >= 0 for number in place.values())
        ):
            raise ValueError(
                f"{kind}: a place must be an epoch and a position, each at least 0, got {place}"
            )
        self._go_to(**place)
        if self._position > self._windows:
            raise ValueError(
                f"{kind}: a place must lie within its epoch of {self._windows} windows, "
                f"got {self._position}"
            )


class PackedBatches(_Epochs):
    """Draw windows from documents laid end to end, each window once in an epoch.

    In epoch ``e`` the text is cut into windows of ``length`` targets, starting at an offset
    drawn for that epoch so that the cuts fall elsewhere each time, and the windows come in
    a random order. Both depend on ``(seed, e)`` alone: the place is two integers. A batch may
    take its first rows from one epoch and its last from the next.

    Args:
        tokens: The text; slices of it are read when they are needed.
        batch_size: Rows ``b``.
        length: Inputs in each row ``l``.
        seed: Fixes the order.
        name: What to call the text in errors.
        documents: Where documents begin and, last, where the text ends, as in a ``Shard``;
            batches then say where they begin in them, and want no token of one document after
            another. ``None`` makes one text of them all.

    Raises:
        ValueError: The text is shorter than ``batch_size * length + 1`` tokens, a size is no
            whole number of at least 1 or the seed none of at least 0, or ``documents`` are no
            boundaries of the text or leave no target.

    Example:
        >>> batches = PackedBatches(np.arange(100), batch_size=2, length=8, seed=0)
        >>> place = batches.state_dict()
        >>> inputs, targets, fresh, _ = batches.next()
        >>> bool((targets == inputs + 1).all()), fresh
        (True, True)
        >>> batches.load_state_dict(place)
        >>> bool((batches.next().inputs == inputs).all())
        True
    """

    _rows = "windows"

    def _draw(self, random: np.random.Generator) -> int:
        offset = self._draw_offset(random, rows=1)
        windows = (len(self._tokens) - 1 - offset) // self._length
        self._starts = offset + self._length * random.permutation(windows)
        return windows

    def next(self) -> Batch:
        """Take the next batch; its rows never continue the one before."""
        starts: list[NDArray[np.int64]] = []
        missing = self._batch_size
        while missing:
            if self._position == self._windows:
                self._go_to(self._epoch + 1, 0)
            taken = self._starts[self._position : self._position + missing]
            self._position += len(taken)
            missing -= len(taken)
            starts.append(taken)
        return self._read(np.concatenate(starts), fresh=True)


class ContinuingBatches(_Epochs):
    """Read ``batch_size`` streams of one text side by side, each batch continuing the last.

    The text is cut into ``b`` streams of equal length, and step ``i`` gives every stream's
    ``i``-th window: a model that carries its state from batch to batch sees far beyond a
    window (truncated backpropagation through time). When the streams end all of them start
    again, at an offset drawn for that epoch, with ``fresh`` set.

    Args:
        tokens: The text; slices of it are read when they are needed.
        batch_size: Streams ``b``.
        length: Inputs in each row ``l``, over which gradients flow.
        seed: Fixes the offsets.
        name: What to call the text in errors.
        documents: As in ``PackedBatches``.

    Raises:
        ValueError: The text is shorter than ``batch_size * length + 1`` tokens, a size is no
            whole number of at least 1 or the seed none of at least 0, or ``documents`` are no
            boundaries of the text or leave no target.

    Example:
        >>> batches = ContinuingBatches(np.arange(100), batch_size=2, length=8, seed=0)
        >>> first, second = batches.next(), batches.next()
        >>> bool((second.inputs[:, 0] == first.targets[:, -1]).all())
        True
        >>> first.fresh, second.fresh
        (True, False)
    """

    _rows = "streams"

    def _draw(self, random: np.random.Generator) -> int:
        offset = self._draw_offset(random, rows=self._batch_size)
        stream = (len(self._tokens) - 1 - offset) // self._batch_size
        self._starts = offset + stream * np.arange(self._batch_size, dtype=np.int64)
        return stream // self._length

    def next(self) -> Batch:
        """Take the next window of every stream."""
        if self._position == self._windows:
            self._go_to(self._epoch + 1, 0)
        fresh = self._position == 0
        starts = self._starts + self._position * self._length
        self._position += 1
        return self._read(starts, fresh)
