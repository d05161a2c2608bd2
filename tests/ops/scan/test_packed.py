"""Laws of several sequences in one scan: each is what it is alone, on every backend."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.testing import assert_close

from mambakit.ops import selective_scan, selective_step
from mambakit.ops.scan.cpu import checkpoint_shape
from tests.ops import packs

OVER_TIME = ("x", "dt", "B", "C", "gate")
FORMS = ["constant", "token", "grouped"]
EXACT = {"rtol": 0, "atol": 0}
LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=6)


@pytest.fixture(scope="session")
def draw_pack(draw):
    """Draw the arguments of a pack, with what its outputs are weighted by."""

    def make(lengths, **options):
        inputs = draw(b=1, l=sum(lengths), **options)
        seed = 1000 + options.get("seed", 0)
        state = draw(b=len(lengths), l=1, **options | {"seed": seed, "without": ()})["state"]
        if "state" in inputs:
            inputs["state"] = state
        return inputs, torch.randn_like(inputs["x"]), torch.randn_like(state)

    return make


def run(inputs, dy, dstate, **how):
    """Give outputs and gradients by name."""
    leaves = {k: v.detach().requires_grad_() for k, v in inputs.items() if torch.is_tensor(v)}
    y, state = selective_scan(**inputs | leaves, **how)
    found = torch.autograd.grad((y, state), list(leaves.values()), (dy, dstate.to(state.dtype)))
    gradients = {f"d{k}": g for k, g in zip(leaves, found, strict=True)}
    return {"y": y.detach(), "last": state.detach(), **gradients}


def over(inputs, span):
    return {k: v[:, span] if k in OVER_TIME and v.ndim > 2 else v for k, v in inputs.items()}


def alone(inputs, dy, dstate, lengths, backend):
    """Run each sequence by itself and put the results together as those of a pack are."""
    found = []
    for k, span in enumerate(packs.spans(lengths)):
        part = over(inputs, span)
        if "state" in part:
            part["state"] = part["state"][k : k + 1]
        found.append(run(part, dy[:, span], dstate[k : k + 1], backend=backend))
    joined = {}
    for name, first in found[0].items():
        parts = [one[name] for one in found]
        if name == "y" or (name[1:] in OVER_TIME and first.ndim > 2):
            joined[name] = torch.cat(parts, dim=1)
        elif name in ("last", "dstate"):
            joined[name] = torch.cat(parts)
        else:
            joined[name] = torch.stack(parts).sum(0)
    return joined


@settings(deadline=None, max_examples=15)
@given(lengths=LENGTHS, forms=st.tuples(*[st.sampled_from(FORMS)] * 2), seed=st.integers(0, 99))
def test_a_pack_is_each_sequence_alone(backend, draw_pack, assert_near, lengths, forms, seed):
    without = ("state", "D") if seed % 3 == 0 else ()
    case = draw_pack(lengths, B=forms[0], C=forms[1], seed=seed, without=without)
    wanted = alone(*case, lengths, "reference")
    got = run(*case, cu_seqlens=packs.ends(lengths), backend=backend)
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
    inputs, dy, dstate = draw_pack(lengths, B="token", C="grouped", seed=seed)

    def pad(t, fill):
        return packs.padded(t, lengths, lefts, l, fill)

    rows = inputs | {k: pad(inputs[k], fill) for k in OVER_TIME}
    how = {"attention_mask": packs.mask(lengths, lefts, l)}
    if side == "right" and seed % 2:
        how = {"lengths": torch.tensor(lengths)}
    got = run(rows, pad(dy, fill), dstate, **how, backend=backend)
    wanted = run(inputs, dy, dstate, cu_seqlens=packs.ends(lengths), backend=backend)
    for name, value in wanted.items():
        in_rows = name == "y" or name[1:] in OVER_TIME
        # where nothing is padding a batch is no pack, and sums over it have another order
        near = EXACT if any(room) else {"rtol": 1e-9, "atol": 1e-9}
        assert_close(got[name], pad(value, 0.0) if in_rows else value, **near)


@settings(deadline=None, max_examples=10)
@given(data=st.data(), lengths=st.lists(st.integers(2, 40), min_size=1, max_size=5))
def test_every_sequence_may_be_cut_and_go_on_in_another_pack(
    backend, draw_pack, assert_near, data, lengths
):
    cuts = [data.draw(st.integers(1, n - 1)) for n in lengths]
    inputs, _, _ = draw_pack(lengths, without=())
    whole = selective_scan(**inputs, cu_seqlens=packs.ends(lengths), backend=backend)
    head = torch.cat([torch.arange(n) < c for n, c in zip(lengths, cuts, strict=True)])
    first = selective_scan(**over(inputs, head), cu_seqlens=packs.ends(cuts), backend=backend)
    rest = over(inputs, ~head) | {"state": first.state}
    left = [n - c for n, c in zip(lengths, cuts, strict=True)]
    second = selective_scan(**rest, cu_seqlens=packs.ends(left), backend=backend)
    assert_near(first.y, whole.y[:, head])
    assert_near(second.y, whole.y[:, ~head])
    assert_near(second.state, whole.state)


def test_the_states_of_a_pack_go_on_by_steps(backend, draw_pack, assert_near):
    lengths = [5, 1, 30, 2]
    inputs, _, _ = draw_pack([n + 1 for n in lengths])
    whole = selective_scan(
        **inputs, cu_seqlens=packs.ends([n + 1 for n in lengths]), backend=backend
    )
    last = packs.ends([n + 1 for n in lengths])[1:] - 1
    head = torch.ones(sum(lengths) + 4, dtype=torch.bool)
    head[last] = False
    state = selective_scan(
        **over(inputs, head), cu_seqlens=packs.ends(lengths), backend=backend
    ).state
    at = {k: v[0, last] if k in OVER_TIME else v for k, v in inputs.items()}
    y, state = selective_step(**at | {"state": state}, backend=backend)
    assert_near(y, whole.y[0, last])
    assert_near(state, whole.state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "lengths", [[1] * 40, [5] * 30, [200], [3, 150, 24, 25, 1, 70]], ids=str
)
@pytest.mark.cpu
def test_the_compiled_kernel_gives_the_bits_of_each_alone(fused, draw_pack, dtype, lengths):
    """By one thread: several cut dB's and dC's sums over channels as the work's size wants."""
    case = draw_pack(lengths, d=20, n=16, dtype=dtype)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        wanted = alone(*case, lengths, "fused")
        got = run(*case, cu_seqlens=packs.ends(lengths), backend="fused")
    finally:
        torch.set_num_threads(threads)
    for name in ("y", "last", "dx", "ddt", "dgate", "dB", "dC", "dstate"):
        assert torch.equal(got[name], wanted[name]), name


@pytest.mark.parametrize("where", ["x", "dt", "B", "C", "gate", "state"])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("lengths", [[4, 3, 5], [100, 64, 130], [3] * 60], ids=str)
def test_nothing_leaks_from_one_sequence_into_another(
    backend, draw_pack, where, poison, lengths
):
    """Neither forward nor backward, from its first step, its last, or its state."""
    inputs, dy, dstate = draw_pack(lengths, B="token", C="token")
    ill = len(lengths) // 2
    span = packs.spans(lengths)[ill]
    how = {"cu_seqlens": packs.ends(lengths), "backend": backend}
    clean = run(inputs, dy, dstate, **how)
    sick = inputs | {where: inputs[where].clone()}
    if where == "state":
        sick["state"][ill] = poison
    else:
        sick[where][:, [span.start, span.stop - 1]] = poison
    dy, dstate = dy.clone(), dstate.clone()
    dy[:, span], dstate[ill] = poison, poison
    got = run(sick, dy, dstate, **how)
    others = torch.ones(sum(lengths), dtype=torch.bool)
    others[span] = False
    for name in ("y", "dx", "ddt", "dgate", "dB", "dC"):
        assert_close(got[name][:, others], clean[name][:, others], **EXACT)
    others = torch.arange(len(lengths)) != ill
    for name in ("last", "dstate"):
        assert_close(got[name][others], clean[name][others], **EXACT)


@pytest.mark.parametrize("without", [(), ("state",)])
@pytest.mark.parametrize("forms", [("token", "grouped"), ("constant", "token")])
def test_gradients_match_finite_differences(backend, draw_pack, without, forms):
    lengths = [1, 3, 2]
    inputs, _, _ = draw_pack(lengths, d=2, n=2, B=forms[0], C=forms[1], without=without)
    names = [k for k, v in inputs.items() if torch.is_tensor(v)]

    def scan(*values):
        given = dict(zip(names, values, strict=True))
        return selective_scan(
            **given, dt_softplus=True, cu_seqlens=packs.ends(lengths), backend=backend
        )

    assert torch.autograd.gradcheck(scan, [inputs[k].requires_grad_() for k in names])


def test_backward_is_deterministic(backend, draw_pack):
    lengths = [5] * 30 + [150]
    case = draw_pack(lengths, d=40, n=16, dtype=torch.float32)
    first, second = (
        run(*case, cu_seqlens=packs.ends(lengths), backend=backend) for _ in range(2)
    )
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_cu_seqlens_may_be_narrow_and_on_the_device(backend, draw_pack):
    inputs, _, _ = draw_pack([4, 9])
    wide = selective_scan(**inputs, cu_seqlens=packs.ends([4, 9]), backend=backend)
    there = packs.ends([4, 9]).to(inputs["x"].device, torch.int32)
    narrow = selective_scan(**inputs, cu_seqlens=there, backend=backend)
    assert_close(narrow.y, wide.y, **EXACT)
    assert_close(narrow.state, wide.state, **EXACT)


@settings(deadline=None, max_examples=100)
@given(lengths=st.lists(st.integers(1, 100), min_size=1), steps=st.integers(1, 64))
def test_checkpoints_of_sequences_never_overlap(lengths, steps):
    """Where a kernel puts them is known without the values of those before."""
    cu_seqlens = packs.ends(lengths).tolist()
    firsts = [start // steps + k for k, start in enumerate(cu_seqlens[:-1])]
    afters = [
        first + -(-(stop - start) // steps)
        for first, (start, stop) in zip(firsts, pairwise(cu_seqlens), strict=True)
    ]
    assert all(after <= first for after, first in zip(afters, firsts[1:], strict=False))
    assert afters[-1] <= sum(lengths) // steps + len(lengths)
    tiles = checkpoint_shape(1, sum(lengths), 1, 1, len(lengths))[1]
    assert sum(-(-n // 24) for n in lengths) <= tiles
