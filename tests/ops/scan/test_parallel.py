"""How the plain PyTorch scan cuts its work, and that every cut gives the same."""

import pytest
import torch
from hypothesis import given, settings, strategies as st

from mambakit.ops import selective_scan
from mambakit.ops.scan import parallel
from tests.ops import packs

CPU, ACCELERATOR = torch.device("cpu"), torch.device("cuda")


@settings(deadline=None, max_examples=200)
@given(
    b=st.integers(1, 70),
    l=st.integers(1, 1 << 17),
    group=st.integers(1, 600),
    g=st.integers(1, 9),
    n=st.integers(1, 256),
    device=st.sampled_from([CPU, ACCELERATOR]),
)
def test_a_plan_covers_everything_once(b, l, group, g, n, device):
    d = group * g
    plan = parallel._plan(b, l, d, n, g, device)
    covered = torch.zeros(b, d, dtype=torch.int64)
    for part in plan.parts:
        covered[part.rows, part.channels] += 1
        assert (part.groups.start, part.groups.stop - 1) == (
            part.channels.start // group,
            (part.channels.stop - 1) // group,
        )
        channels = part.channels.stop - part.channels.start
        assert channels % (part.groups.stop - part.groups.start) == 0
    assert bool((covered == 1).all())
    assert plan.chunks * plan.length >= l > plan.chunks * plan.length - plan.chunks
    blocks = plan.blocks()
    assert [s.start for s in blocks[1:]] == [s.stop for s in blocks[:-1]]
    assert (blocks[0].start, blocks[-1].stop) == (0, plan.length)


@pytest.fixture
def cut_small(monkeypatch):
    """Cut into parts of few rows and channels, and into many chunks."""
    plan = parallel._plan

    def small(b, l, d, n, g, device):
        per_group = d // g
        parts = [
            parallel._Part(slice(r, r + 1), slice(c, c + per_group), slice(i, i + 1))
            for r in range(b)
            for i, c in enumerate(range(0, d, per_group))
        ]
        return plan(b, l, d, n, g, device)._replace(
            parts=parts, chunks=7, length=-(-l // 7), steps=4
        )

    monkeypatch.setattr(parallel, "_plan", small)


@pytest.mark.parametrize("B", ["constant", "token", "grouped"])
def test_every_cut_gives_the_same(cut_small, draw, gradients, assert_near, B):
    inputs = draw(b=3, l=100, d=8, B=B, C="grouped", g=4)
    wanted, got = gradients(inputs, "reference"), gradients(inputs, "parallel")
    for name, value in wanted.items():
        assert_near(got[name], value, name)


@pytest.mark.parametrize("lengths", [[100], [5] * 20, [15, 15, 1, 44, 25], [2, 97, 1]], ids=str)
def test_every_cut_of_a_pack_gives_the_same(cut_small, draw, gradients, assert_near, lengths):
    """Chunks of 15 steps and blocks of 4, in which sequences begin, end or do neither."""
    inputs = draw(b=1, l=100, d=8, C="grouped", g=4) | {"cu_seqlens": packs.ends(lengths)}
    inputs["state"] = draw(b=len(lengths), l=1, d=8)["state"]
    wanted, got = gradients(inputs, "reference"), gradients(inputs, "parallel")
    for name, value in wanted.items():
        assert_near(got[name], value, name)


def test_channels_of_one_group_may_be_cut(monkeypatch, draw, gradients, assert_near):
    plan = parallel._plan

    def small(b, l, d, n, g, device):
        parts = [
            parallel._Part(slice(0, b), slice(c, min(d, c + 3)), slice(0, 1))
            for c in range(0, d, 3)
        ]
        return plan(b, l, d, n, g, device)._replace(parts=parts)

    monkeypatch.setattr(parallel, "_plan", small)
    inputs = draw(b=2, l=40, d=8)
    wanted, got = gradients(inputs, "reference"), gradients(inputs, "parallel")
    for name, value in wanted.items():
        assert_near(got[name], value, name)


def test_long_sequences_and_long_sums_do_not_overflow():
    """Sums of dt A below -1e5 only ever decay; nothing divides by an exponential."""
    l = 20_000
    x, dt = torch.ones(1, l, 1), torch.full((1, l, 1), 10.0)
    A, ones = torch.tensor([[-1.0]]), torch.ones(1, l, 1)
    y, state = selective_scan(x, dt, A, ones, ones, backend="parallel")
    torch.testing.assert_close(y[:, 1:], torch.full_like(y[:, 1:], 10.000454))
    torch.testing.assert_close(state, torch.full((1, 1, 1), 10.000454))
