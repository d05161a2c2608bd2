"""How packs of sequences are cut for the scan's kernels: lists of spans, and what a cut costs.

A span is a sequence or a chunk of it. Blocks take spans from a list, so that a pack of many
short sequences and one long one is as many even pieces of work as the GPU has room for. Long
spans come first: what is left for the end is short.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from torch import Tensor

from ... import _spans
from ..._spans import Spans, Words
from .operands import CHECKPOINT_STEPS


class Listed(NamedTuple):
    """A list of spans: how many, and where it lies; nowhere if they are those of a batch."""

    number: int
    address: int | None = None


class Table(NamedTuple):
    """The lists of spans that the kernels of a call take.

    ``spans`` are all; ``first`` those that others of their sequence follow, ``later`` those
    that follow others and are joined; ``cut`` has one for each sequence of several spans, with
    its first chunk and, as ``steps``, how many they are. ``chunks`` counts the chunks of such
    sequences.
    ``bins``, if blocks take several spans, are not spans: number i says which of them is the
    first of a block's share, and one more says where the last share ends.
    """

    spans: Listed
    first: Listed
    later: Listed
    cut: Listed
    bins: Listed
    chunks: int
    words: Tensor | None = None  # where they lie


def batch(b: int, chunks: int, tail: int = 1) -> Table:
    """Return the table of a batch whose rows have so many chunks each, the tail not joined."""
    every, later = Listed(b * chunks), Listed(b * (chunks - tail))
    return Table(every, every, later, Listed(b), every, b * chunks)


def table(
    cu_seqlens: bytes, steps: int, like: Tensor, *, handed_on: bool = False, share: int = 0
) -> Table:
    """Cut a pack into spans of at most ``steps`` steps and send the lists to a device.

    If ``handed_on`` a span comes after all that have fewer of their sequence's before them.
    ``share``, if not 0, is how many steps a block should have, where it works in whole
    checkpoints; shorter spans are put together.
    """
    lists, chunks = _lists(cu_seqlens, steps, handed_on, share)
    sent = _spans.send(np.concatenate([_spans.words_of(part) for part in lists]), like)
    placed, address = [], sent.data_ptr()
    for part in lists:
        placed.append(Listed(len(part), address))
        address += part.nbytes
    spans, first, later, cut, bins = placed
    bins = bins._replace(number=max(0, bins.number - 1))
    return Table(spans, first, later, cut, bins, chunks, sent)


# The layers of a model ask for the same lists, one after another.
@lru_cache(maxsize=16)
def _lists(
    cu_seqlens: bytes, steps: int, handed_on: bool, share: int
) -> tuple[tuple[Spans, Spans, Spans, Spans, Words], int]:
    starts = _spans.starts_of(cu_seqlens)
    spans = _spans.cut(starts, steps)
    counts = -(-np.diff(starts) // steps)
    cut = spans[(spans["before"] == 0) & (spans["after"] > 0)]
    cut["steps"] = counts[counts > 1]
    longest_first = -spans["steps"]
    if handed_on:
        order = np.lexsort((longest_first, spans["before"]))
    else:
        order = np.argsort(longest_first, kind="stable")
    spans = spans[order]
    bins = np.zeros(0, np.int64)
    if share:
        worked = -(-spans["steps"].astype(np.int64) // CHECKPOINT_STEPS) * CHECKPOINT_STEPS
        taken = np.cumsum(worked) - worked
        first = np.flatnonzero(np.diff(taken // share, prepend=-1))
        bins = np.append(first, len(spans))
    lists = spans, spans[spans["after"] > 0], spans[spans["before"] > 0], cut, bins
    return lists, int(cut["steps"].sum())


class Work(NamedTuple):
    """What a cut makes of a pack, in steps, for each column of blocks."""

    steps: int
    longest: int
    spans: int
    whole: int  # spans of as many steps as there may be, of which each has
    whole_steps: int
    carried_steps: int  # of spans that others of their sequence follow


def work(lengths: Words, steps: int, more: int = 0) -> Work:
    """Return what cutting sequences into spans of at most ``steps`` steps makes of them.

    To each span are added ``more`` steps, which it takes beside its own.
    """
    counts = -(-lengths // steps)
    spans = int(counts.sum())
    return Work(
        steps=int(lengths.sum()) + more * spans,
        longest=min(steps, int(lengths.max())) + more,
        spans=spans,
        whole=int((lengths // steps).sum()),
        whole_steps=steps + more,
        carried_steps=int((counts - 1).sum()) * (steps + more),
    )


def makespan(work: Work, columns: int, room: int) -> float:
    """Return about when the last block ends, if so many have room and long ones start first."""
    # no less than all of it shared out, than the longest, and than the whole spans in waves
    waves = -(-work.whole * columns // room)
    return max(work.steps * columns / room, work.longest, waves * work.whole_steps)
