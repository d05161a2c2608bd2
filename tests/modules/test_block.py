"""Laws of the residual block."""

import torch
from torch.testing import assert_close

from mambakit.modules import Block, Mamba


def make(dtype=None):
    torch.manual_seed(0)
    return Block(Mamba(8, d_state=4, dtype=dtype), 8, dtype=dtype)


def test_the_mixers_output_is_added_to_the_stream():
    block, x = make(), torch.randn(2, 7, 8)
    y, state = block(x)
    mixed, mixed_state = block.mixer(block.norm(x))
    assert_close(y, x + mixed)
    assert_close(tuple(state), tuple(mixed_state))


def test_a_silent_mixer_leaves_the_stream_alone():
    block, x = make(), torch.randn(2, 7, 8)
    torch.nn.init.zeros_(block.mixer.out_proj.weight)
    assert_close(block(x)[0], x, rtol=0, atol=0)


def test_a_float32_stream_stays_float32_around_a_bfloat16_mixer():
    y, _ = make(torch.bfloat16)(torch.randn(2, 7, 8))
    assert y.dtype == torch.float32


def test_a_cut_changes_nothing():
    block, x = make(), torch.randn(2, 7, 8)
    left, state = block(x[:, :3])
    right, _ = block(x[:, 3:], state)
    assert_close(torch.cat([left, right], dim=1), block(x)[0])
