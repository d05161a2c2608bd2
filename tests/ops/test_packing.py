"""How several sequences share a call: what is accepted, and how a batch becomes a pack."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from mambakit.ops import causal_conv1d, causal_conv1d_step, selective_scan, selective_step
from mambakit.ops._packing import arrange, bounds
from tests.ops import packs

CPU = torch.device("cpu")


@settings(deadline=None, max_examples=50)
@given(
    rows=st.lists(st.tuples(*[st.integers(0, 4)] * 2, st.integers(1, 6)), min_size=1),
    whole=st.booleans(),
)
def test_packing_leaves_the_padding_out_and_puts_it_back(rows, whole):
    lefts, rights, lengths = ([row[i] for row in rows] for i in range(3))
    l = max(map(sum, rows))
    lefts = [
        l - n if right == 0 else min(left, l - n)
        for left, right, n in zip(lefts, rights, lengths, strict=True)
    ]
    real = packs.mask(lengths, lefts, l)
    cu_seqlens, packing = arrange(
        "test", len(rows), l, real.device, None, None, real if whole else real.int()
    )
    batch = torch.randn(len(rows), l, 3, dtype=torch.float64).requires_grad_()
    if real.all():
        assert cu_seqlens is packing is None
        return
    packed = packing.pack(batch)
    assert torch.equal(packed[0], batch[real])
    assert bounds("test", cu_seqlens, packed.shape[1]) == packs.ends(lengths).tolist()
    back = packing.unpack(packed)
    assert torch.equal(back, batch * real[..., None])
    (gradient,) = torch.autograd.grad(back.sum(), batch)
    assert torch.equal(gradient, real[..., None].expand_as(batch).double())
    assert torch.equal(packing.pack(real.int()), torch.ones_like(packed[..., 0]).int())


def test_lengths_are_a_mask_of_right_padding():
    lengths = [3, 1, 5]
    of_lengths, packing = arrange("test", 3, 5, CPU, None, torch.tensor(lengths), None)
    of_mask, other = arrange("test", 3, 5, CPU, None, None, packs.mask(lengths, [0, 0, 0], 5))
    assert torch.equal(of_lengths, of_mask)
    assert torch.equal(packing.places, other.places)


def test_lengths_that_leave_nothing_out_are_no_packing():
    assert arrange("test", 2, 5, CPU, None, torch.tensor([5, 5]), None) == (None, None)
    assert arrange("test", 0, 5, CPU, None, torch.empty(0, dtype=torch.int64), None) == (
        None,
        None,
    )


def test_the_callers_integers_may_be_narrow_and_strided():
    strided = torch.tensor([0, 9, 4, 9, 9, 9], dtype=torch.int32)[::2]
    cu_seqlens, packing = arrange("test", 1, 9, CPU, strided, None, None)
    assert packing is None
    assert cu_seqlens.dtype == torch.int64
    assert cu_seqlens.is_contiguous()
    assert cu_seqlens.tolist() == [0, 4, 9]


@pytest.mark.parametrize("operation", [selective_scan, causal_conv1d])
def test_what_becomes_of_the_callers_integers_does_not_reach_the_gradient(backend, operation):
    memory = np.array([0, 4, 9])
    x = torch.randn(1, 9, 2, dtype=torch.float64, requires_grad=True)
    steps, rows = torch.rand_like(x), torch.randn(1, 9, 4, dtype=torch.float64)
    A = -torch.rand(2, 4, dtype=torch.float64)
    others = (steps, A, rows, rows) if operation is selective_scan else (A,)
    y, state = operation(x, *others, cu_seqlens=torch.from_numpy(memory), backend=backend)
    total = y.square().sum() + state.square().sum()
    (wanted,) = torch.autograd.grad(total, x, retain_graph=True)
    memory[1] = 6
    (found,) = torch.autograd.grad(total, x)
    assert torch.equal(found, wanted)


def call_scan(b, **how):
    x, ones = torch.zeros(b, 9, 3), torch.ones(b, 9, 2)
    return selective_scan(x, x, -torch.ones(3, 2), ones, ones, **how)


def call_conv(b, **how):
    return causal_conv1d(torch.zeros(b, 9, 3), torch.zeros(3, 4), **how)


def bad(b, how, message):
    return pytest.param(b, how, message, id=message[:60])


T = torch.tensor
ROW = [1, 1, 1, 1, 1, 0, 0, 0, 0]
BAD = [
    bad(1, {"cu_seqlens": T([3, 5, 9])}, "cu_seqlens must start at 0, got 3"),
    bad(1, {"cu_seqlens": T([0, 5, 5, 9])}, "cu_seqlens must rise, got 5 after 5 at index 2"),
    bad(1, {"cu_seqlens": T([0, 5, 4, 9])}, "cu_seqlens must rise, got 4 after 5 at index 2"),
    bad(1, {"cu_seqlens": T([0, 5, 8])}, "cu_seqlens must end at l=9, got 8"),
    bad(1, {"cu_seqlens": T([0, 10])}, "cu_seqlens must end at l=9, got 10"),
    bad(1, {"cu_seqlens": T([0.0, 9.0])}, "cu_seqlens must be int32 or int64, got float32"),
    bad(1, {"cu_seqlens": [0, 9]}, "cu_seqlens must be a tensor, got list"),
    bad(1, {"cu_seqlens": torch.zeros(2, dtype=torch.int64, device="meta")},
        "cu_seqlens must have values, got a tensor on meta"),
    bad(1, {"cu_seqlens": T([0, 9]).to_sparse()},
        "cu_seqlens must be a dense tensor, got layout sparse_coo"),
    bad(1, {"cu_seqlens": T([0])},
        "cu_seqlens must have shape (s+1) with at least one sequence, got (1,)"),
    bad(1, {"cu_seqlens": T([[0, 9]])},
        "cu_seqlens must have shape (s+1) with at least one sequence, got (1, 2)"),
    bad(2, {"cu_seqlens": T([0, 9])},
        "cu_seqlens must come with b=1, one row that holds every sequence, got b=2"),
    bad(2, {"lengths": T([4, 0])}, "lengths must lie between 1 and l=9, got 0 in row 1"),
    bad(2, {"lengths": T([10, 4])}, "lengths must lie between 1 and l=9, got 10 in row 0"),
    bad(2, {"lengths": T([4])}, "lengths must have shape (b=2), got (1,)"),
    bad(2, {"lengths": T([4.0, 4.0])}, "lengths must be int32 or int64, got float32"),
    bad(2, {"lengths": 4}, "lengths must be a tensor, got int"),
    bad(2, {"lengths": torch.zeros(2, dtype=torch.int64, device="meta")},
        "lengths must have values, got a tensor on meta"),
    bad(2, {"attention_mask": T([ROW, [1, 0, *ROW[:7]]])},
        "attention_mask must have one run of ones in each row, got 2 runs in row 1"),
    bad(2, {"attention_mask": T([ROW, [0] * 9])},
        "attention_mask must have one run of ones in each row, got no one in row 1"),
    bad(2, {"attention_mask": T([ROW, [2, *ROW[1:]]])},
        "attention_mask must hold 0 and 1 alone, got 2 in row 1"),
    bad(1, {"attention_mask": T([ROW, ROW])},
        "attention_mask must have shape (b=1, l=9), got (2, 9)"),
    bad(2, {"attention_mask": T([ROW, ROW]).float()},
        "attention_mask must be bool or of integers, got float32"),
    bad(2, {"attention_mask": [ROW, ROW]}, "attention_mask must be a tensor, got list"),
    bad(2, {"attention_mask": torch.ones(2, 9, dtype=torch.bool, device="meta")},
        "attention_mask must have values, got a tensor on meta"),
    bad(2, {"attention_mask": T([ROW, ROW]).to_sparse()},
        "attention_mask must be a dense tensor, got layout sparse_coo"),
    bad(2, {"attention_mask": torch.nested.nested_tensor(
            [T(ROW), T(ROW[:5])], layout=torch.jagged)},
        "attention_mask must be a dense tensor, got a nested one"),
    bad(1, {"cu_seqlens": T([0, 9]), "lengths": T([9])},
        "lengths must be None where cu_seqlens is given, got both"),
    bad(1, {"lengths": T([9]), "attention_mask": T([ROW])},
        "attention_mask must be None where lengths is given, got both"),
]  # fmt: skip


@pytest.mark.refuses
@pytest.mark.parametrize("call", [call_scan, call_conv])
@pytest.mark.parametrize(("b", "how", "message"), BAD)
def test_bad_packs_get_one_clear_sentence(backend, call, b, how, message):
    name = "selective_scan" if call is call_scan else "causal_conv1d"
    with pytest.raises(ValueError, match=f"^{name}: {re.escape(message)}$"):
        call(b, **how, backend=backend)


@pytest.mark.refuses
def test_the_state_of_a_pack_has_a_row_for_each_sequence():
    cu_seqlens = T([0, 4, 9])
    with pytest.raises(
        ValueError, match=r"state must have shape \(s=2, d=3, n=2\), got \(1, 3"
    ):
        call_scan(1, cu_seqlens=cu_seqlens, state=torch.zeros(1, 3, 2))
    with pytest.raises(
        ValueError, match=r"state must have shape \(s=2, d=3, w-1=3\), got \(1,"
    ):
        call_conv(1, cu_seqlens=cu_seqlens, state=torch.zeros(1, 3, 3))
    with pytest.raises(
        ValueError, match=r"state must have shape \(b=2, d=3, n=2\), got \(1, 3"
    ):
        call_scan(2, lengths=T([4, 9]), state=torch.zeros(1, 3, 2))


@pytest.mark.refuses
@pytest.mark.parametrize("step", [selective_step, causal_conv1d_step])
@pytest.mark.parametrize("name", ["cu_seqlens", "lengths", "attention_mask"])
def test_a_step_has_no_sequences_to_tell_apart(step, name):
    with pytest.raises(TypeError, match=name):
        step(torch.zeros(2, 3), torch.zeros(3, 4), **{name: None})
