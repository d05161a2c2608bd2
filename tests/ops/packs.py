"""Ways to lay sequences of several lengths into one call, written as plainly as can be."""

from itertools import accumulate, pairwise

import torch


def ends(lengths):
    """Give ``cu_seqlens`` of the lengths."""
    return torch.tensor([0, *accumulate(lengths)], device="cpu")


def spans(lengths):
    """Give the slice of the pack that each sequence is."""
    return [slice(a, b) for a, b in pairwise(accumulate(lengths, initial=0))]


def mask(lengths, lefts, l):
    """Say where tokens are if row i has ``lefts[i]`` steps of padding before its sequence."""
    step = torch.arange(l)
    first, count = (torch.tensor(v)[:, None] for v in (lefts, lengths))
    return (first <= step) & (step < first + count)


def padded(packed, lengths, lefts, l, fill):
    """Move the sequences of a pack (1, total, ...) into rows (b, l, ...)."""
    rows = packed.new_full((len(lengths), l, *packed.shape[2:]), fill)
    for row, left, span in zip(rows, lefts, spans(lengths), strict=True):
        row[left : left + span.stop - span.start] = packed[0, span]
    return rows
