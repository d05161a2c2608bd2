"""Laws of the rows' streams of chance."""

import pytest
import torch
from torch.testing import assert_close

from mambakit.generation.chance import RowChance, row_keys


def numbers(keys, count=100):
    chance = RowChance(keys, "cpu")
    return torch.stack([chance.draw() for _ in range(count)], dim=1)


def test_a_row_depends_on_its_key_alone():
    three = numbers([(1, 0), (1, 1), (2**64 - 1, 0)])
    assert_close(numbers([(2**64 - 1, 0), (1, 1)]), three[[2, 1]], rtol=0, atol=0)
    assert len(three.unique()) == 300


def test_rows_that_leave_take_nothing_with_them():
    keys = [(5, row) for row in range(4)]
    whole = numbers(keys)
    chance = RowChance(keys, "cpu")
    for at in range(100):
        drawn = chance.draw()
        kept = [0, 1, 2, 3] if at <= 10 else [1, 3] if at <= 70 else [3]
        assert_close(drawn, whole[kept, at], rtol=0, atol=0)
        if at == 10:
            chance.keep([1, 3])
        if at == 70:
            chance.keep([1])


def test_numbers_are_uniform():
    drawn = numbers([(0, row) for row in range(200)])
    assert drawn.min() >= 0
    assert drawn.max() < 1
    shares = torch.histc(drawn, 10, 0, 1) / drawn.numel()
    assert (shares - 0.1).abs().max() < 4 * (0.09 / drawn.numel()) ** 0.5
    neighbours = torch.corrcoef(drawn[:2])[0, 1]
    assert neighbours.abs() < 0.4


def test_keys_number_rows_or_samples():
    assert row_keys(-1, None, 2, 2) == [(2**64 - 1, row) for row in range(4)]
    assert row_keys([7, 8], None, 2, 2) == [(7, 0), (7, 1), (8, 0), (8, 1)]


@pytest.mark.parametrize("generator", [None, torch.Generator()])
def test_without_a_seed_torch_is_asked(generator):
    def keys():
        (generator or torch.default_generator).manual_seed(3)
        return row_keys(None, generator, 3, 1)

    assert keys() == keys()
    assert keys() != row_keys(None, generator, 3, 1)
