"""Laws of several sequences in one convolution: each is what it is alone, on every backend."""

import math

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.testing import assert_close

from mambakit.ops import causal_conv1d, causal_conv1d_step
from tests.ops import packs

EXACT = {"rtol": 0, "atol": 0}
LENGTHS = st.lists(st.integers(1, 150), min_size=1, max_size=6)
NAMES = ("dx", "dweight", "dbias", "dstate")


@pytest.fixture(scope="session")
def draw_pack(draw):
    """Draw the inputs of a pack, and what its outputs are weighted by."""

    def make(lengths, d=5, w=4, *, dtype=torch.float64, seed=0):
        torch.manual_seed(seed)
        x, weight, bias, _ = draw(1, sum(lengths), d, w, dtype=dtype)
        _, _, _, state = draw(len(lengths), 1, d, w, dtype=dtype)
        return (x, weight, bias, state), torch.randn_like(x), torch.randn_like(state)

    return make


def run(inputs, dy, dstate, **how):
    """Give outputs and gradients by name; a missing input has none."""
    x, weight, bias, state = live = [
        None if t is None else t.detach().requires_grad_() for t in inputs
    ]
    y, last = causal_conv1d(x, weight, bias, activation="silu", state=state, **how)
    asked = [t for t in live if t is not None]
    found = iter(torch.autograd.grad((y, last), asked, (dy, dstate), materialize_grads=True))
    gradients = {n: next(found) for n, t in zip(NAMES, live, strict=True) if t is not None}
    return {"y": y.detach(), "last": last.detach(), **gradients}


def alone(inputs, dy, dstate, lengths, backend):
    """Run each sequence by itself and put the results together as those of a pack are."""
    x, weight, bias, state = inputs
    found = [
        run(
            (x[:, span], weight, bias, None if state is None else state[k : k + 1]),
            dy[:, span],
            dstate[k : k + 1],
            backend=backend,
        )
        for k, span in enumerate(packs.spans(lengths))
    ]
    joined = {}
    for name in found[0]:
        parts = [one[name] for one in found]
        if name in ("y", "dx"):
            joined[name] = torch.cat(parts, dim=1)
        elif name in ("last", "dstate"):
            joined[name] = torch.cat(parts)
        else:
            joined[name] = torch.stack(parts).sum(0)
    return joined


@settings(deadline=None, max_examples=15)
@given(lengths=LENGTHS, w=st.sampled_from([1, 2, 4, 7]), seed=st.integers(0, 99))
def test_a_pack_is_each_sequence_alone(backend, draw_pack, assert_near, lengths, w, seed):
    (x, weight, bias, state), *weights = draw_pack(lengths, w=w, seed=seed)
    given = (x, weight, bias if seed % 3 else None, state if seed % 2 else None)
    wanted = alone(given, *weights, lengths, "reference")
    got = run(given, *weights, cu_seqlens=packs.ends(lengths), backend=backend)
    for name, value in wanted.items():
        assert_near(got[name], value, f"{name} of {lengths}")


@settings(deadline=None, max_examples=15)
@given(data=st.data(), lengths=LENGTHS, seed=st.integers(0, 99))
def test_padding_anywhere_changes_nothing_and_receives_nothing(
    backend, draw_pack, data, lengths, seed
):
    l = max(lengths) + data.draw(st.integers(0, 9))
    side = data.draw(st.sampled_from(["left", "right", "both"]))
    room = [l - n for n in lengths]
    lefts = {"left": room, "right": [0] * len(room), "both": [r // 2 for r in room]}[side]
    fill = data.draw(st.sampled_from([0.0, math.nan, math.inf]))
    (x, *others), dy, dstate = draw_pack(lengths, seed=seed)

    def pad(t, fill):
        return packs.padded(t, lengths, lefts, l, fill)

    how = {"attention_mask": packs.mask(lengths, lefts, l).int()}
    if side == "right" and seed % 2:
        how = {"lengths": torch.tensor(lengths)}
    got = run((pad(x, fill), *others), pad(dy, fill), dstate, **how, backend=backend)
    cu_seqlens = packs.ends(lengths)
    wanted = run((x, *others), dy, dstate, cu_seqlens=cu_seqlens, backend=backend)
    for name, value in wanted.items():
        # where nothing is padding a batch is no pack, and sums over it have another order
        near = EXACT if any(room) else {"rtol": 1e-9, "atol": 1e-9}
        assert_close(got[name], pad(value, 0.0) if name in ("y", "dx") else value, **near)


@settings(deadline=None, max_examples=10)
@given(data=st.data(), lengths=st.lists(st.integers(2, 40), min_size=1, max_size=5))
def test_every_sequence_may_be_cut_and_go_on(backend, draw_pack, assert_near, data, lengths):
    """In another pack, and in the end by a step."""
    cuts = [data.draw(st.integers(1, n - 1)) for n in lengths]
    (x, weight, bias, state), _, _ = draw_pack(lengths)
    whole = causal_conv1d(
        x, weight, bias, state=state, cu_seqlens=packs.ends(lengths), backend=backend
    )
    head = torch.cat([torch.arange(n) < c for n, c in zip(lengths, cuts, strict=True)])
    first = causal_conv1d(
        x[:, head], weight, bias, state=state, cu_seqlens=packs.ends(cuts), backend=backend
    )
    left = packs.ends([n - c for n, c in zip(lengths, cuts, strict=True)])
    second = causal_conv1d(
        x[:, ~head], weight, bias, state=first.state, cu_seqlens=left, backend=backend
    )
    assert_near(first.y, whole.y[:, head])
    assert_near(second.y, whole.y[:, ~head])
    assert torch.equal(second.state, whole.state)
    after = torch.randn(len(lengths), 5, dtype=x.dtype)
    y, last = causal_conv1d_step(after, weight, bias, state=second.state, backend=backend)
    rows = torch.cat([second.state, after[:, :, None]], dim=2)
    assert_near(y, (rows * weight).sum(2) + bias)
    assert torch.equal(last, rows[:, :, 1:])


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("lengths", [[4, 3, 5], [100, 64, 130], [2] * 90, [1] * 9], ids=str)
def test_nothing_leaks_from_one_sequence_into_another(backend, draw_pack, poison, lengths):
    """Neither forward nor backward, from its inputs or its state."""
    (x, weight, bias, state), dy, dstate = draw_pack(lengths)
    ill = len(lengths) // 2
    span = packs.spans(lengths)[ill]
    how = {"cu_seqlens": packs.ends(lengths), "backend": backend}
    clean = run((x, weight, bias, state), dy, dstate, **how)
    sick = [t.clone() for t in (x, state, dy, dstate)]
    for t in (sick[0], sick[2]):
        t[:, span] = poison
    for t in (sick[1], sick[3]):
        t[ill] = poison
    x, state, dy, dstate = sick
    got = run((x, weight, bias, state), dy, dstate, **how)
    others = torch.ones(sum(lengths), dtype=torch.bool)
    others[span] = False
    for name in ("y", "dx"):
        assert_close(got[name][:, others], clean[name][:, others], **EXACT)
    others = torch.arange(len(lengths)) != ill
    for name in ("last", "dstate"):
        assert_close(got[name][others], clean[name][others], **EXACT)


@pytest.mark.parametrize("w", [1, 4])
def test_gradients_match_finite_differences(backend, draw_pack, w):
    lengths = [1, 5, 2]
    inputs, _, _ = draw_pack(lengths, d=2, w=w)
    live = [t.requires_grad_() for t in inputs if t.numel()]

    def filtered(*_):
        x, weight, bias, state = inputs
        return causal_conv1d(
            x, weight, bias, activation="silu", state=state, cu_seqlens=packs.ends(lengths),
            backend=backend,
        )  # fmt: skip

    assert torch.autograd.gradcheck(filtered, live)


def test_the_state_keeps_its_layout(backend, draw_pack):
    inputs, _, _ = draw_pack([4, 9], dtype=torch.float32)
    x, weight, bias, state = inputs
    cu_seqlens = packs.ends([4, 9]).int()
    last = causal_conv1d(
        x, weight, bias, state=state, cu_seqlens=cu_seqlens, backend=backend
    ).state
    assert last.stride() == (15, 1, 5)
