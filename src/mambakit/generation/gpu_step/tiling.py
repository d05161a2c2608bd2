"""How a step is cut into blocks, which kernels it takes, and for how many sequences a graph is.

All of it depends on sizes alone. The rates are an H200's, and only their proportions matter.
"""

import math
from functools import cache
from typing import NamedTuple

# Bytes a second: of memory, of the cache that all multiprocessors share, into one of them; and
# into one block, of a matrix that comes from memory, and of vectors that it has to wait for.
_MEMORY, _CACHE, _PROCESSOR, _BLOCK, _AWAITED = 4.3e12, 6.5e12, 5e10, 3e10, 1.6e10
# Bytes of shared memory for a block: two of them, or one of each of two kernels, run at once.
_SHARED, _RESIDENT = 110 * 1024, 2
_MOST_STAGES = 12
_WARPS = 8

# Room for sequences: a graph of the next size takes those that there are.
_ROOMS = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128)


def room(b: int) -> int:
    """Return for how many sequences a graph is made that is to take ``b`` of them.

    Example:
        >>> room(5), room(128), room(129)
        (8, 128, 256)
    """
    return next((size for size in _ROOMS if size >= b), math.ceil(b / 128) * 128)


# From so many sequences on a library's products and the kernels around them are faster.
_LIBRARY_FROM = 32
# Up to so many sequences the kernels of a few are faster if they start before the end of those
# before: with more, early blocks take the places that others wait for.
_OVERLAP_TO = 16


# What registers hold: for each number of states that the scan of many sequences has, the
# largest rank, from 225 on but for a few bytes; and the widest window of their convolution.
_LARGEST_RANK = {16: 256, 32: 128}
_WIDEST_WINDOW = 5


def takes_library(b: int, n: int, r: int, d: int, w: int) -> bool:
    """Return whether ``scan_many.cu`` and what goes with it can serve, and are faster."""
    fits = r <= _LARGEST_RANK.get(n, 0) and w <= _WIDEST_WINDOW
    return b >= _LIBRARY_FROM and fits and d % 16 == 0


def library_spans(columns: int) -> int:
    """Return over how many spans of columns a library's sums of out_proj are.

    Example:
        >>> library_spans(4096), library_spans(48)
        (2, 1)
    """
    # a second kernel would add up the library's own spans; of odd widths it is slow
    return 2 if columns % 128 == 0 else 1


def overlaps(b: int, library: bool) -> bool:
    """Return whether kernels that may start early are faster so."""
    return library or b <= _OVERLAP_TO


class GPU(NamedTuple):
    """What of a GPU decides how work is cut."""

    processors: int
    shared_bytes: int  # that a block may have

    @property
    def share(self) -> int:
        """Bytes of shared memory that a block is given at most."""
        return min(_SHARED, self.shared_bytes)


def group(b: int, n: int) -> int:
    """Return how many sequences a block of the scan has: as many as fit its registers."""
    return 1 << min(b, 4, max(1, 64 // n)).bit_length() - 1


class Tiling(NamedTuple):
    """How a block has its part of a product; ``product.cu`` says what the words mean."""

    rows: int
    columns: int
    stages: int
    span: int
    spans: int
    shared_bytes: int

    def grid(self, rows: int, b: int) -> tuple[int, int, int]:
        """Return how many blocks there are."""
        return math.ceil(rows / self.rows), math.ceil(b / self.columns), self.spans


@cache
def tile(
    rows: int,
    columns: int,
    b: int,
    weight_bytes: int,
    factor_bytes: int,
    gpu: GPU,
    readers: int,
    places: int = _RESIDENT,
) -> Tiling:
    """Choose the tiling that should be fastest.

    Args:
        rows: Rows of the matrix.
        columns: Its columns, which each sum is over.
        b: Vectors.
        weight_bytes: Bytes of a weight.
        factor_bytes: Bytes of a vector's number.
        gpu: The GPU.
        readers: How often each sum is read if sums are over spans of columns, to be added up
            later; 0 allows one span alone.
        places: Of a multiprocessor, for this kernel's blocks; what is left is for the next's
            that start early.
    """
    memory = rows * columns * weight_bytes / _MEMORY
    vector_rate = _AWAITED if readers > 1 else _PROCESSOR
    best = None
    for block_rows in (64, 32, 16):
        for block_columns in (8, 16, 32, 64, 128):
            if block_columns > 8 and block_columns >= 2 * b:
                continue  # half of the columns would be empty
            if factor_bytes == 4 and block_columns > 16:
                continue
            step, stage = _step(block_rows, block_columns, weight_bytes, factor_bytes)
            for wanted in (1, 2, 3, 4, 6, 8) if readers else (1,):
                span = math.ceil(columns / wanted / step) * step
                spans = math.ceil(columns / span)
                blocks = math.ceil(rows / block_rows) * math.ceil(b / block_columns) * spans
                matrix = span * block_rows * weight_bytes
                vectors = span * min(b, block_columns) * factor_bytes
                turns = math.ceil(blocks / gpu.processors)
                waves = math.ceil(blocks / (places * gpu.processors))
                sums = 4 * spans * b * rows * (1 + readers) / _CACHE if readers else 0.0
                cost = sums + max(
                    memory,
                    blocks * (matrix + vectors) / _CACHE,
                    turns * (matrix + vectors) / _PROCESSOR,
                    waves * (matrix / _BLOCK + vectors / vector_rate),
                )
                if best is None or cost < 0.98 * best[0]:
                    stages = min(_MOST_STAGES, gpu.share // stage, math.ceil(span / step) + 1)
                    stages = max(2, stages)
                    slices = _slices(block_rows, block_columns)
                    shared = max(stages * stage, 4 * slices * block_columns * (block_rows + 4))
                    found = (block_rows, block_columns, stages, span, spans, shared)
                    best = cost, Tiling(*found)
    assert best is not None
    return best[1]


def _slices(rows: int, columns: int) -> int:
    """Return in how many slices the warps share a step, as ``product.cu`` has them."""
    wide = 2 if columns == 128 and rows > 16 else 1
    return _WARPS // (wide * (rows // (16 * wide)))


def _step(rows: int, columns: int, weight_bytes: int, factor_bytes: int) -> tuple[int, int]:
    """Return the columns of the matrix in a step, and the bytes of a stage."""
    step = _slices(rows, columns) * 64 // weight_bytes
    return step, step * (rows * weight_bytes + columns * factor_bytes)


class ScanTiling(NamedTuple):
    """How ``scan_many.cu`` has its part; it says what the words mean."""

    sequences: int
    together: int
    slots: int
    kept: bool
    shared_bytes: int

    def grid(self, d: int, b: int) -> tuple[int, int, int]:
        """Return how many blocks there are."""
        return math.ceil(d / SCAN_CHANNELS), math.ceil(b / self.sequences), 1


# Of a block of ``scan_many.cu``, and the most sequences that it has.
SCAN_CHANNELS = 128
_MOST_SEQUENCES = 32


def tile_scan(b: int, d: int, n: int, r: int, gpu: GPU) -> ScanTiling:
    """Cut the scan of many sequences so that all of its blocks run at once, if they can.

    Example:
        >>> tile_scan(64, 4096, 16, 128, GPU(132, 227 * 1024))
        ScanTiling(sequences=8, together=2, slots=3, kept=True, shared_bytes=96768)
    """
    blocks = max(1, _RESIDENT * gpu.processors // math.ceil(d / SCAN_CHANNELS))
    sequences = min(_MOST_SEQUENCES, math.ceil(b / blocks))
    together = 2 if n == 16 else 1
    slot = together * SCAN_CHANNELS * n * 4
    depth = math.ceil(r / 32) * 32
    pitch = depth if depth // 8 % 8 == 4 else depth + 32
    rows = math.ceil(sequences / 8) * 8
    others = _WARPS * 8 * 17 * 8 + rows * (2 * pitch * 2 + 2 * n * 4)
    weights = SCAN_CHANNELS * depth * 2
    kept = gpu.share - others - weights >= 2 * slot
    others += weights if kept else 0
    slots = max(2, min((gpu.share - others) // slot, math.ceil(sequences / together)))
    return ScanTiling(sequences, together, slots, kept, slots * slot + others)
