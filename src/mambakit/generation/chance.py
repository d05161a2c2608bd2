"""Where chance comes from: one stream of numbers for each row, whatever its neighbours do."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from .sampling import exact_device, is_whole

_BLOCK = 64


class RowChance:
    """Give each row one uniform number of [0, 1) at a time, out of a stream of its own.

    A row's stream is fixed by its key, a seed and a number, and by nothing else: not by how
    many rows there are, which of them have left, or the device. The numbers are those of the
    counter-based generator Philox 4x64.

    Args:
        keys: A seed of 64 bits and a number for each row.
        device: Where the numbers are wanted; they are given on ``exact_device`` of it.

    Source: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", 2011.

    Example:
        >>> both = RowChance([(7, 0), (7, 1)], "cpu")
        >>> alone = RowChance([(7, 1)], "cpu")
        >>> bool(both.draw()[1] == alone.draw()[0])
        True
    """

    def __init__(self, keys: Sequence[tuple[int, int]], device: torch.device | str) -> None:
        words = np.array(keys, dtype=np.uint64)  # of Python's, NumPy makes floating point
        self._rows = [np.random.Generator(np.random.Philox(key=key)) for key in words]
        self._device = exact_device(torch.device(device))
        self._block = torch.empty(len(keys), 0, device=self._device)
        self._used = 0

    def draw(self) -> Float[Tensor, " b"]:
        """Return the next number of each row, float64."""
        if self._used == self._block.shape[1]:
            numbers = np.stack([row.random(_BLOCK) for row in self._rows])
            self._block, self._used = torch.from_numpy(numbers).to(self._device), 0
        self._used += 1
        return self._block[:, self._used - 1]

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows alone."""
        self._rows = [self._rows[row] for row in rows]
        self._block = self._block[list(rows)]


def row_keys(
    seed: int | Sequence[int] | None, generator: torch.Generator | None, rows: int, samples: int
) -> list[tuple[int, int]]:
    """Return the key of each row's stream: ``samples`` rows for each of ``rows`` prompts.

    One seed numbers all rows in order. A seed for each prompt numbers that prompt's samples,
    so that they do not depend on where in the batch it stands. Without a seed, torch's global
    state (or ``generator``) is asked for one.

    Raises:
        ValueError: A seed is no whole number of 64 bits, there are more or fewer than prompts,
            or a generator is given too or is none.
    """
    if generator is not None and not isinstance(generator, torch.Generator):
        raise ValueError(
            f"generate: generator must be a torch.Generator or None, got {generator!r}"
        )
    if seed is None:
        where = "cpu" if generator is None else generator.device
        drawn = torch.randint(-(2**63), 2**63 - 1, (), generator=generator, device=where)
        seed = int(drawn)
    elif generator is not None:
        raise ValueError("generate: seed and generator must not both be given")
    if isinstance(seed, Sequence) and not isinstance(seed, str):
        if len(seed) != rows:
            raise ValueError(
                f"generate: seed must be one number or one for each prompt, {rows}, "
                f"got {len(seed)}"
            )
        return [(_bits(one), sample) for one in seed for sample in range(samples)]
    return [(_bits(seed), row) for row in range(rows * samples)]


def _bits(seed: object) -> int:
    if not is_whole(seed):
        raise ValueError(f"generate: seed must be a whole number, got {seed!r}")
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"generate: seed must be at least -2**63 and below 2**64, got {seed}")
    return int(seed) % 2**64
