"""The forward CUDA kernels, on a GPU or on the emulator, against the definition in float64."""

import pytest
import torch

from mambakit.ops.scan import reference
from mambakit.ops.scan.cuda import forward
from mambakit.ops.scan.cuda.forward import Plan
from mambakit.ops.scan.cuda.operands import CHECKPOINT_STEPS, FEWER_STEPS, checkpoint_shape

NAMES = ("x", "dt", "A", "B", "C", "D", "gate", "dt_bias", "state")

# Warps that walk through time and warps side by side in time, in one chunk and in several.
WALK, WIDE = Plan(), Plan(wide=8)
CHUNKED = [Plan(chunks=2), Plan(chunks=2, handed_on=True), Plan(4, chunks=2, handed_on=True)]
NARROW = [Plan(narrow=True), Plan(4, narrow=True), Plan(8, True, 2, handed_on=True)]


def shown(way):
    """Name a test after its plan."""
    words = f"wide{way.wide}" if way.wide else "walk", "narrow" * way.narrow
    return "-".join(filter(None, (*words, f"chunks{way.chunks}", "handed" * way.handed_on)))


@pytest.fixture
def operands(draw, emulated):
    """Draw a scan's operands in the order of NAMES; exact in every dtype."""

    def make(*shape, dtype=torch.float32, softplus=True, **options):
        inputs = draw(*shape, dtype=dtype, **options)
        if not softplus:
            inputs |= {k: inputs[k].abs() for k in ("dt", "dt_bias") if k in inputs}
        chosen = [inputs.get(name) for name in NAMES]
        return [None if t is None else t.to(emulated) for t in chosen]

    return make


def truth(given, softplus=True):
    return reference.scan(*(None if t is None else t.double() for t in given), softplus)


def run(given, way=None, softplus=True, save=False, **more):
    plan = None if way is None else forward.cut(way, given[0].shape[1])
    return forward.forward(*given, softplus, save, plan=plan, **more)


@pytest.mark.parametrize("way", [WALK, WIDE, *CHUNKED, *NARROW], ids=shown)
@pytest.mark.parametrize("shape", [(2, 131, 40, 16), (1, 17, 1, 16), (2, 1, 24, 16)], ids=str)
def test_a_scan_is_the_recurrence(operands, assert_near, way, shape):
    given = operands(*shape)
    y, last, _ = run(given, way)
    wanted_y, wanted_last = truth(given)
    assert_near(y, wanted_y)
    assert_near(last, wanted_last)


@pytest.mark.parametrize("n", [1, 3, 8, 20, 64, 256])
def test_any_number_of_states(operands, assert_near, n):
    given = operands(2, 35, 6, n)
    y, last, _ = run(given, WALK)
    wanted_y, wanted_last = truth(given)
    # a sum of n products; each of them is as near as the table says
    assert_near(y / n**0.5, wanted_y / n**0.5)
    assert_near(last, wanted_last)


@pytest.mark.parametrize(
    ("n", "way"),
    [(1, WIDE), (4, Plan(narrow=True)), (5, Plan(narrow=True)), (8, Plan(4, True))],
    ids=str,
)
def test_other_ways_with_few_states(operands, assert_near, n, way):
    given = operands(1, 150, 70, n, dtype=torch.bfloat16)
    y, last, _ = run(given, way)
    wanted_y, wanted_last = truth(given)
    assert_near(y, wanted_y)
    assert_near(last, wanted_last)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_dtype(operands, assert_near, dtype):
    given = operands(2, 40, 24, 16, dtype=dtype)
    y, last, _ = run(given, WALK)
    wanted_y, wanted_last = truth(given)
    assert y.dtype == dtype
    assert last.dtype == torch.promote_types(dtype, torch.float32)
    assert_near(y, wanted_y)
    assert_near(last, wanted_last)


@pytest.mark.parametrize("way", [WALK, WIDE], ids=shown)
@pytest.mark.parametrize(
    ("B", "C"),
    [("constant", "token"), ("token", "constant"), ("constant", "constant"),
     ("grouped", "token"), ("token", "grouped"), ("grouped", "grouped")],
)  # fmt: skip
def test_every_form_of_the_coefficients(operands, assert_near, way, B, C):
    given = operands(2, 40, 24, 16, B=B, C=C, g=3)
    y, last, _ = run(given, way)
    wanted_y, wanted_last = truth(given)
    assert_near(y, wanted_y)
    assert_near(last, wanted_last)


@pytest.mark.parametrize("without", [("D", "gate"), ("dt_bias", "state")], ids=str)
@pytest.mark.parametrize("softplus", [True, False])
def test_every_option(operands, assert_near, without, softplus):
    given = operands(1, 40, 24, 16, softplus=softplus, without=without)
    y, last, _ = run(given, WALK, softplus)
    wanted_y, wanted_last = truth(given, softplus)
    assert_near(y, wanted_y)
    assert_near(last, wanted_last)


@pytest.mark.parametrize("way", [WALK, WIDE], ids=shown)
def test_rows_may_lie_in_a_wider_tensor(operands, way):
    given = operands(2, 40, 24, 16)
    within = list(given)
    for k in (0, 1, 3, 4, 6):
        wide = given[k].new_full((*given[k].shape[:-1], given[k].shape[-1] + 5), torch.nan)
        wide[..., 3:-2] = given[k]
        within[k] = wide[..., 3:-2]
    for found, wanted in zip(run(within, way), run(given, way), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("way", [WALK, WIDE, *CHUNKED], ids=shown)
@pytest.mark.parametrize("steps", [CHECKPOINT_STEPS, FEWER_STEPS])
def test_checkpoints_are_the_states_on_the_way(operands, assert_near, way, steps):
    given = operands(2, 2 * CHECKPOINT_STEPS + 9, 24, 16)
    _, _, checkpoints = run(given, way, save=True, steps=steps)
    assert checkpoints.shape == checkpoint_shape(*given[0].shape, 16, steps=steps)
    assert len(checkpoints[0]) == 2 * CHECKPOINT_STEPS // steps + 1
    assert_near(checkpoints[:, 0], given[8])
    for k in range(1, len(checkpoints[0])):
        start = [t[:, : k * steps] if i in (0, 1, 3, 4, 6) else t for i, t in enumerate(given)]
        assert_near(checkpoints[:, k], truth(start)[1])


@pytest.mark.parametrize("way", [WALK, WIDE, *CHUNKED], ids=shown)
def test_a_nan_stays_in_its_row_and_after_its_step(operands, way):
    given = operands(2, 150, 24, 16)
    clean = run(given, way)
    for k in (0, 1, 3, 4, 6):
        spoilt = [t.clone() for t in given]
        spoilt[k][1, 70] = torch.nan
        y, last, _ = run(spoilt, way)
        assert y[1, 70].isnan().all()
        assert torch.equal(y[0], clean[0][0])
        assert torch.equal(y[1, :70], clean[0][1, :70])
        assert torch.equal(last[0], clean[1][0])


def test_two_runs_are_bit_equal(operands):
    given = operands(2, 150, 40, 16, dtype=torch.bfloat16)
    for way in (WALK, WIDE, *CHUNKED, *NARROW):
        for first, second in zip(run(given, way), run(given, way), strict=True):
            assert torch.equal(first, second)


def test_every_sequence_is_covered_by_its_chunks():
    for l in (1, 63, 64, 65, 1000, 1048576):
        for chunks in (1, 2, 3, 7, 100):
            plan = forward.cut(Plan(chunks=chunks), l)
            assert 1 <= plan.chunks <= chunks
            assert plan.chunk_steps % CHECKPOINT_STEPS == 0
            assert (plan.chunks - 1) * plan.chunk_steps < l <= plan.chunks * plan.chunk_steps


@pytest.mark.parametrize("d", [1, 64, 2048, 100000])
@pytest.mark.parametrize("n", [1, 16, 256])
def test_the_choice_is_a_plan(d, n):
    for b in (1, 8):
        for l in (1, 2048, 1048576):
            for wide in (False, True):
                plan = forward.choose(b, l, d, n, 1, wide, 132)
                assert plan == forward.cut(plan, l)
                assert wide or not plan.wide
                assert n > 1 or not plan.narrow
