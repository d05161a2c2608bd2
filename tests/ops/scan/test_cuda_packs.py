"""Packs in the CUDA kernels, on a GPU or on the emulator: each sequence is as it is alone."""

import numpy as np
import pytest
import torch

from mambakit.ops import _spans
from mambakit.ops.scan import reference
from mambakit.ops.scan.cuda import backward, forward, packs
from mambakit.ops.scan.cuda.forward import Plan
from mambakit.ops.scan.cuda.operands import checkpoint_shape

NAMES = ("x", "dt", "A", "B", "C", "D", "gate", "dt_bias", "state")
TOKENS = ("x", "dt", "B", "C", "gate")
LENGTHS = (1, 40, 3, 130, 64, 1, 65)

WAYS = [
    Plan(),
    Plan(wide=8),
    Plan(chunks=3),
    Plan(chunks=3, handed_on=True),
    Plan(8, chunks=2, handed_on=True),
]


def whole(steps, **more):
    """The backward plan that leaves sequences of up to so many steps whole."""
    steps = -(-steps // 64) * 64
    return backward.Plan(1, steps, 1, steps, **more)


def cut(steps, lengths=LENGTHS, **more):
    return backward.Plan(-(-max(lengths) // steps), steps, 1, steps, **more)


@pytest.fixture
def pack(draw, emulated):
    """Draw a pack's operands as NAMES, what arrives at its results, and ``cu_seqlens``."""

    def make(lengths=LENGTHS, d=24, n=16, *, dtype=torch.float32, **options):
        inputs = draw(1, sum(lengths), d, n, dtype=dtype, **options)
        source = torch.Generator("cpu").manual_seed(2)
        wide = torch.promote_types(dtype, torch.float32)

        def normal(*shape, dtype):
            return torch.randn(shape, generator=source, device="cpu").to(emulated, dtype)

        if "state" in inputs:
            inputs["state"] = normal(len(lengths), d, n, dtype=wide)
        given = [inputs.get(name) for name in NAMES]
        given = [None if t is None else t.to(emulated) for t in given]
        dy = normal(1, sum(lengths), d, dtype=dtype)
        dlast = normal(len(lengths), d, n, dtype=wide)
        cu_seqlens = torch.tensor([0, *lengths], device="cpu").cumsum(0)
        return given, dy, dlast, cu_seqlens

    return make


def alone(given, cu_seqlens, k):
    """The operands of one sequence."""
    a, b = cu_seqlens[k : k + 2].tolist()

    def of(name, t):
        if t is None or (name in TOKENS and t.ndim > 2):
            return t if t is None else t[:, a:b]
        return t[k : k + 1] if name == "state" else t

    return [of(name, t) for name, t in zip(NAMES, given, strict=True)]


def truth(given, cu_seqlens, dtype=torch.float64):
    """What the definition gives sequence by sequence: y and the last states."""
    exact = [None if t is None else t.to(dtype) for t in given]
    parts = [
        reference.scan(*alone(exact, cu_seqlens, k), True) for k in range(len(cu_seqlens) - 1)
    ]
    ys, lasts = zip(*parts, strict=True)
    return torch.cat(ys, 1), torch.cat(lasts)


def exact_gradients(given, dy, dlast, cu_seqlens):
    leaves = [None if t is None else t.detach().double().requires_grad_() for t in given]
    outputs = truth(leaves, cu_seqlens)
    present = [t for t in leaves if t is not None]
    arriving = [dy.double(), dlast.double()]
    found = iter(torch.autograd.grad(outputs, present, arriving, materialize_grads=True))
    return {n: next(found) for n, t in zip(NAMES, leaves, strict=True) if t is not None}


def gradients(given, dy, dlast, cu_seqlens, plan=None, **more):
    way = None if plan is None else forward.cut(WAYS[0], int(cu_seqlens.diff().max()))
    saved = forward.forward(*given, True, True, cu_seqlens=cu_seqlens, plan=way)[2]
    call = (dy, dlast, *given, saved.view(-1), True)
    found = backward.backward(*call, cu_seqlens=cu_seqlens, plan=plan, **more)
    for gradient, tensor in zip(found, given, strict=True):
        assert (gradient is None) == (tensor is None)
        if tensor is not None:
            assert gradient.shape == tensor.shape
            assert gradient.dtype == tensor.dtype
    return dict(zip(NAMES, found, strict=True))


def assert_gradients(assert_near, found, wanted):
    """Assert each gradient near, in the unit of its own root mean square."""
    for name, exact in wanted.items():
        unit = exact.square().mean().sqrt().clamp_min(1e-30)
        assert_near((found[name].double() / unit).to(found[name].dtype), exact / unit, name)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_each_sequence_is_bit_for_bit_what_it_is_alone(pack, assert_near, way):
    given, _, _, cu_seqlens = pack()
    plan = forward.cut(way, max(LENGTHS))
    y, last, saved = forward.forward(*given, True, True, cu_seqlens=cu_seqlens, plan=plan)
    wanted_y, wanted_last = truth(given, cu_seqlens)
    assert_near(y, wanted_y)
    assert_near(last, wanted_last)
    assert saved.shape == checkpoint_shape(1, sum(LENGTHS), 24, 16, len(LENGTHS))
    for k, l in enumerate(LENGTHS):
        a = int(cu_seqlens[k])
        own = forward.cut(plan._replace(chunks=-(-l // plan.chunk_steps)), l)
        one = forward.forward(*alone(given, cu_seqlens, k), True, True, plan=own)
        first = a // 64 + k
        assert torch.equal(y[:, a : a + l], one[0])
        assert torch.equal(last[k : k + 1], one[1])
        assert torch.equal(saved[:, first : first + one[2].shape[1]], one[2])


@pytest.mark.parametrize(
    ("n", "dtype", "options"),
    [
        (1, torch.float32, {"B": "grouped"}),
        (5, torch.float64, {"C": "constant"}),
        (16, torch.bfloat16, {"B": "grouped", "C": "grouped"}),
        (64, torch.float32, {"without": ("dt_bias", "state")}),
    ],
    ids=str,
)
def test_every_kind_of_operands(pack, assert_near, n, dtype, options):
    lengths = (2, 70, 1, 133)
    case = pack(lengths, n=n, dtype=dtype, **options)
    given, _, _, cu_seqlens = case
    y, last, _ = forward.forward(*given, True, False, cu_seqlens=cu_seqlens)
    wanted_y, wanted_last = truth(given, cu_seqlens)
    # a sum of n products; each of them is as near as the table says
    assert_near(y / n**0.5, wanted_y / n**0.5)
    assert_near(last, wanted_last)
    wanted = exact_gradients(*case)
    assert_gradients(assert_near, gradients(*case, plan=cut(64, lengths)), wanted)


@pytest.mark.parametrize("plan", [whole(130), cut(64), cut(128, share=300), None], ids=str)
def test_gradients_are_those_of_the_recurrence(pack, assert_near, plan):
    case = pack()
    assert_gradients(assert_near, gradients(*case, plan), exact_gradients(*case))


@pytest.mark.parametrize("n", [16, 64])
def test_whole_sequences_have_bit_for_bit_the_gradients_they_have_alone(pack, n):
    given, dy, dlast, cu_seqlens = pack(d=40, n=n)
    # in shares of one sequence or several, and passes over channels
    passes = 2 if n > 16 else 1
    for share in (1, 150):
        plan = whole(130, share=share)._replace(passes=passes)
        found = gradients(given, dy, dlast, cu_seqlens, plan)
        for k, l in enumerate(LENGTHS):
            a = int(cu_seqlens[k])
            own = alone(given, cu_seqlens, k)
            call = (dy[:, a : a + l], dlast[k : k + 1], *own)
            way = forward.cut(WAYS[0], l)
            saved = forward.forward(*own, True, True, plan=way)[2].view(-1)
            one = whole(l)._replace(passes=passes)
            wanted = backward.backward(*call, saved, True, plan=one)
            for name, t in zip(NAMES, wanted, strict=True):
                if name in TOKENS:
                    assert torch.equal(found[name][:, a : a + l], t)
            assert torch.equal(found["state"][k : k + 1], wanted[8])


def test_many_sequences_of_a_step_and_none_but_one(pack, assert_near):
    for lengths in ((1,) * 150, (70,)):
        case = pack(lengths, d=8)
        given, _, _, cu_seqlens = case
        y, last, _ = forward.forward(*given, True, False, cu_seqlens=cu_seqlens)
        wanted_y, wanted_last = truth(given, cu_seqlens)
        assert_near(y, wanted_y)
        assert_near(last, wanted_last)
        assert_gradients(assert_near, gradients(*case), exact_gradients(*case))


@pytest.mark.parametrize("way", WAYS[1:4], ids=str)
def test_a_nan_stays_in_its_sequence(pack, way):
    given, _, _, cu_seqlens = pack()
    plan = forward.cut(way, max(LENGTHS))

    def run(given):
        return forward.forward(*given, True, True, cu_seqlens=cu_seqlens, plan=plan)

    clean = run(given)
    a, b = cu_seqlens[3:5].tolist()
    for k in (0, 1, 3, 4, 6):
        spoilt = [t.clone() for t in given]
        spoilt[k][0, a + 70 : b] = torch.nan
        y, last, _ = run(spoilt)
        assert y[0, a + 70 : b].isnan().all()
        assert torch.equal(y[:, : a + 70], clean[0][:, : a + 70])
        assert torch.equal(y[:, b:], clean[0][:, b:])
        others = torch.arange(len(LENGTHS), device=last.device) != 3
        assert torch.equal(last[others], clean[1][others])


@pytest.mark.parametrize("plan", [whole(130, share=500), cut(64)], ids=str)
def test_a_nan_stays_in_its_sequences_gradients(pack, plan):
    given, dy, dlast, cu_seqlens = pack()
    wanted = gradients(given, dy, dlast, cu_seqlens, plan)
    a = int(cu_seqlens[3])
    dy[0, a + 30] = dlast[1] = torch.nan
    found = gradients(given, dy, dlast, cu_seqlens, plan)
    spoilt = torch.zeros(sum(LENGTHS), dtype=torch.bool, device=dy.device)
    spoilt[a : a + 31] = spoilt[1:41] = True
    for name in TOKENS:
        assert found[name][0, a + 30].isnan().any()
        assert torch.equal(found[name][:, ~spoilt], wanted[name][:, ~spoilt])
    others = [k for k in range(len(LENGTHS)) if k not in (1, 3)]
    assert torch.equal(found["state"][others], wanted["state"][others])


def test_two_runs_give_the_same_bits(pack):
    case = pack(dtype=torch.bfloat16)
    plan = cut(64, share=100)
    first, second = gradients(*case, plan), gradients(*case, plan)
    for name in NAMES:
        assert torch.equal(first[name], second[name])


def test_no_gradient_of_the_last_states_is_one_of_zeros(pack):
    given, dy, dlast, cu_seqlens = pack()
    for plan in (whole(130), cut(64)):
        zeros = gradients(given, dy, dlast.zero_(), cu_seqlens, plan)
        none = gradients(given, dy, None, cu_seqlens, plan)
        for name in NAMES:
            assert torch.equal(zeros[name], none[name])


def test_rows_may_lie_in_a_wider_tensor_of_any_batch_stride(pack):
    given, dy, dlast, cu_seqlens = pack()
    within = list(given)
    for k in (0, 1, 3, 4, 6):
        t = given[k]
        wide = t.new_full((*t.shape[:-1], t.shape[-1] + 5), torch.nan)
        wide[..., 3:-2] = t
        within[k] = wide[..., 3:-2].as_strided(t.shape, (7, *wide.stride()[1:]), 3)
    found = gradients(within, dy, dlast, cu_seqlens)
    wanted = gradients(given, dy, dlast, cu_seqlens)
    for name in NAMES:
        assert torch.equal(found[name], wanted[name])
    there = torch.zeros(1, sum(LENGTHS), 56).to(dy.device)[..., 24:48]
    assert gradients(given, dy, dlast, cu_seqlens, dgate=there)["gate"] is there
    assert torch.equal(there, wanted["gate"])


@pytest.mark.parametrize("plan", WAYS, ids=str)
@pytest.mark.parametrize("lengths", [LENGTHS, (30, 1, 39), (64, 128, 20)], ids=str)
def test_no_room_for_checkpoints_is_left_unwritten(pack, lengths, plan):
    given, _, _, cu_seqlens = pack(lengths)
    plan = forward.cut(plan, max(lengths))
    torch.use_deterministic_algorithms(True)  # new tensors are full of NaN
    try:
        saved = forward.forward(*given, True, True, cu_seqlens=cu_seqlens, plan=plan)[2]
    finally:
        torch.use_deterministic_algorithms(False)
    assert saved.shape == checkpoint_shape(1, sum(lengths), 24, 16, len(lengths))
    assert not saved.isnan().any()


SHAPES = {
    "equal": [2048] * 8,
    "short": [32] * 512,
    "one long": [16384, *[256] * 8],
    "steps": [1] * 300,
    "mixed": [1 + 37 * k % 3000 for k in range(50)],
}


@pytest.mark.parametrize("lengths", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(("d", "n"), [(2048, 16), (64, 1), (5120, 64)])
def test_plans_cover_a_pack_and_fill_the_gpu(lengths, d, n):
    starts = np.cumsum([0, *lengths])
    plan = forward.choose_for_pack(starts.tobytes(), d, n, 1, True, 132)
    assert plan == forward.cut(plan, max(lengths))
    form = backward.Form((), 8, 512, 1, 0, 4, 0, 2 * n)
    back = backward.plan_for_pack(starts.tobytes(), d, n, 1, form, 132)
    assert back.chunk_steps % 64 == 0
    assert back.chunks == -(-max(lengths) // back.chunk_steps)
    for steps, share in ((plan.chunk_steps, 0), (back.chunk_steps, back.share)):
        (spans, first, later, whole, bins), chunks = packs._lists(
            starts.tobytes(), steps, False, share
        )
        taken = np.concatenate([np.arange(s["begin"], s["begin"] + s["steps"]) for s in spans])
        assert np.array_equal(np.sort(taken), np.arange(starts[-1]))
        assert (np.diff(spans["steps"]) <= 0).all()
        assert len(first) == len(later) == chunks - len(whole)
        if share:
            assert bins[0] == 0
            assert bins[-1] == len(spans)
            assert (np.diff(bins) > 0).all()
            # a sequence of one step takes the time of a checkpoint
            assert np.diff(bins).max() <= max(1, 2 * back.share // 64)
    if max(lengths) == 16384 and d == 2048:
        # one long sequence has no more than its part of the time
        assert back.chunk_steps <= 2 * sum(lengths) // 8
        assert plan.chunks > 1 or plan.wide


def test_a_list_is_sent_however_long_it_is(emulated):
    for count in (1, 500, 501, 2001):
        words = np.arange(count) * 2**33 - 5
        sent = _spans.send(words, torch.zeros(1).to(emulated))
        assert sent.device == torch.zeros(1).to(emulated).device
        assert sent.tolist() == words.tolist()


def test_spans_say_what_lies_on_either_side():
    spans = _spans.cut(np.array([0, 3, 10, 11, 2**33]), np.array([3, 4, 9, 2**31 - 64]))
    assert spans["begin"].tolist()[:4] == [0, 3, 7, 10]
    assert spans["steps"].tolist()[:4] == [3, 4, 3, 1]
    assert spans["sequence"].tolist() == [0, 1, 1, 2, 3, 3, 3, 3, 3]
    assert spans["before"].tolist()[:5] == [0, 0, 4, 0, 0]
    assert spans["after"].tolist()[:4] == [0, 3, 0, 0]
    assert spans["chunk"].tolist() == [0, 0, 1, 0, 2, 3, 4, 5, 6]
    assert (spans["before"][5:] > 0).all()
    assert spans["after"][-1] == 0
    assert (spans["after"][4:-1] > 0).all()
