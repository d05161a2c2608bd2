"""The backward CUDA kernels, on a GPU or on the emulator, against autograd in float64."""

import pytest
import torch

from mambakit.ops import _cuda
from mambakit.ops.scan import reference
from mambakit.ops.scan.cuda import backward, forward

NAMES = ("x", "dt", "A", "B", "C", "D", "gate", "dt_bias", "state")

# between two states that forward saves
BOTH = pytest.mark.parametrize("steps", [64, 32])


@pytest.fixture
def operands(draw, emulated):
    """Draw a scan's operands in the order of NAMES, and gradients of its two results."""

    def make(b, l, d, n, *, dtype=torch.float32, softplus=True, **options):
        inputs = draw(b, l, d, n, dtype=dtype, **options)
        if not softplus:
            inputs |= {k: inputs[k].abs() for k in ("dt", "dt_bias") if k in inputs}
        source = torch.Generator("cpu").manual_seed(2)
        wide = torch.promote_types(dtype, torch.float32)
        dy = torch.randn(b, l, d, generator=source, device="cpu").to(dtype)
        dlast = torch.randn(b, d, n, generator=source, device="cpu").to(wide)
        chosen = [inputs.get(name) for name in NAMES]
        given = [None if t is None else t.to(emulated) for t in chosen]
        return given, dy.to(emulated), dlast.to(emulated)

    return make


def by_autograd(given, dy, dlast, dtype, softplus=True):
    leaves = [None if t is None else t.detach().to(dtype).requires_grad_() for t in given]
    y, last = reference.scan(*leaves, softplus)
    present = [t for t in leaves if t is not None]
    found = iter(torch.autograd.grad([y, last], present, [dy.to(dtype), dlast.to(last.dtype)]))
    return {n: next(found) for n, t in zip(NAMES, leaves, strict=True) if t is not None}


def by_kernel(given, dy, dlast, chunks=None, softplus=True, passes=1, plan=None, steps=64):
    l = given[0].shape[1]
    saved = forward.forward(*given, softplus, True, steps=steps)[2]
    if chunks is not None:
        plan = backward.cut(chunks, l, passes)
    found = backward.backward(dy, dlast, *given, saved.view(-1), softplus, plan=plan)
    for gradient, tensor in zip(found, given, strict=True):
        assert (gradient is None) == (tensor is None)
        if tensor is not None:
            assert gradient.shape == tensor.shape
            assert gradient.dtype == tensor.dtype
    return {n: t for n, t in zip(NAMES, found, strict=True) if t is not None}


def assert_gradients(assert_near, found, wanted):
    """Assert each gradient near, in the unit of its own root mean square."""
    for name, exact in wanted.items():
        unit = exact.square().mean().sqrt().clamp_min(1e-30)
        assert_near((found[name].double() / unit).to(found[name].dtype), exact / unit, name)


@pytest.mark.parametrize("chunks", [None, 1, 3])
@pytest.mark.parametrize(
    "shape", [(2, 197, 40, 16), (1, 16, 1, 16), (2, 1, 24, 16), (1, 65, 3, 16)], ids=str
)
@BOTH
def test_gradients_are_those_of_the_recurrence(operands, assert_near, shape, chunks, steps):
    case = operands(*shape)
    found = by_kernel(*case, chunks, steps=steps)
    assert_gradients(assert_near, found, by_autograd(*case, torch.float64))


@pytest.mark.parametrize(("start", "fits"), [(0, True), (24, True), (3, False)])
def test_the_gates_gradient_goes_into_a_wider_tensor_if_it_is_aligned(operands, start, fits):
    given, dy, dlast = operands(2, 70, 24, 16)
    saved = forward.forward(*given, True, True)[2]
    call = (dy, dlast, *given, saved.view(-1), True)
    wide = torch.zeros(2, 70, 60).to(dy.device)
    there = wide[..., start : start + 24]
    found = backward.backward(*call, dgate=there)[6]
    assert (found is there) == fits
    assert torch.equal(found, backward.backward(*call)[6])
    assert wide.count_nonzero() == (found.count_nonzero() if fits else 0)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8, 20, 32, 64, 128, 256])
def test_any_number_of_states(operands, assert_near, n):
    case = operands(2, 70, 12, n)
    assert_gradients(assert_near, by_kernel(*case, 2), by_autograd(*case, torch.float64))


@pytest.mark.parametrize("chunks", [None, 1, 2])
@pytest.mark.parametrize(
    ("shape", "options"),
    [((2, 197, 40), {}), ((1, 1, 8), {}), ((1, 65, 136), {"without": ("D", "gate")}),
     ((2, 70, 48), {"B": "grouped", "C": "grouped", "g": 3}),
     ((2, 130, 24), {"softplus": False, "without": ("dt_bias", "state")})],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_one_state_of_two_bytes(operands, assert_near, shape, options, chunks, dtype):
    softplus = options.get("softplus", True)
    case = operands(*shape, 1, dtype=dtype, **options)
    wanted = by_autograd(*case, torch.float64, softplus)
    assert_gradients(assert_near, by_kernel(*case, chunks, softplus), wanted)


# On GPUs where registers are handed over a block has as many runners as walkers here.
@pytest.mark.parametrize(
    "shape", [(1, 200, 136, 8), (1, 200, 72, 16), (1, 200, 40, 32)], ids=str
)
@pytest.mark.parametrize("chunks", [1, 3])
@BOTH
def test_many_channels_of_two_bytes(operands, assert_near, shape, chunks, steps):
    case = operands(*shape, dtype=torch.bfloat16)
    found = by_kernel(*case, chunks, steps=steps)
    assert_gradients(assert_near, found, by_autograd(*case, torch.float64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@BOTH
def test_every_dtype(operands, assert_near, dtype, steps):
    case = operands(2, 70, 24, 16, dtype=dtype)
    found = by_kernel(*case, 2, steps=steps)
    assert_gradients(assert_near, found, by_autograd(*case, torch.float64))


@pytest.mark.parametrize(
    ("B", "C", "n"),
    [("constant", "token", 16), ("token", "constant", 16), ("constant", "constant", 16),
     ("grouped", "token", 16), ("token", "grouped", 16), ("grouped", "grouped", 16),
     ("grouped", "token", 1), ("token", "constant", 64)],
)  # fmt: skip
def test_every_form_of_the_coefficients(operands, assert_near, B, C, n):
    case = operands(2, 70, 36, n, B=B, C=C, g=3)
    assert_gradients(assert_near, by_kernel(*case, 2), by_autograd(*case, torch.float64))


@pytest.mark.parametrize("without", [("D", "gate"), ("dt_bias", "state")], ids=str)
@pytest.mark.parametrize("softplus", [True, False])
def test_every_option(operands, assert_near, without, softplus):
    case = operands(1, 70, 24, 16, softplus=softplus, without=without)
    assert_gradients(
        assert_near,
        by_kernel(*case, 2, softplus),
        by_autograd(*case, torch.float64, softplus),
    )


def test_no_gradient_of_the_last_state_is_one_of_zeros(operands):
    given, dy, dlast = operands(1, 70, 24, 16)
    zeros, none = by_kernel(given, dy, dlast.zero_()), by_kernel(given, dy, None)
    for name in NAMES:
        assert torch.equal(zeros[name], none[name])


def test_rows_may_lie_in_a_wider_tensor(operands):
    given, dy, dlast = operands(2, 70, 24, 16)
    within = list(given)
    for k in (0, 1, 3, 4, 6):
        wide = given[k].new_full((*given[k].shape[:-1], given[k].shape[-1] + 5), torch.nan)
        wide[..., 3:-2] = given[k]
        within[k] = wide[..., 3:-2]
    found, wanted = by_kernel(within, dy, dlast), by_kernel(given, dy, dlast)
    for name in NAMES:
        assert torch.equal(found[name], wanted[name])


def test_several_passes_over_channels_are_one(operands, assert_near):
    case = operands(1, 70, 100, 64)
    found, wanted = by_kernel(*case, 1, passes=2), by_kernel(*case, 1)
    for name in NAMES:
        assert_near(found[name], wanted[name])


@pytest.mark.parametrize(
    ("shape", "chunk", "steps"),
    [((2, 197, 40, 16), 64, 64), ((1, 130, 136, 16), 64, 64), ((1, 65, 3, 16), 64, 64),
     ((2, 197, 24, 1), 128, 64), ((1, 197, 12, 5), 64, 64), ((1, 130, 36, 64), 64, 64),
     ((2, 197, 40, 16), 64, 32), ((1, 130, 136, 16), 64, 32), ((1, 197, 12, 5), 64, 32)],
)  # fmt: skip
@pytest.mark.parametrize("ends", [True, False])
def test_chunks_may_be_handed_on(operands, assert_near, shape, chunk, steps, ends):
    given, dy, dlast = operands(*shape, without=() if ends else ("state",))
    plan = backward.hand_on(chunk, shape[1])
    assert plan.tail == plan.chunks > 1
    found = by_kernel(given, dy, dlast if ends else None, plan=plan, steps=steps)
    wanted = by_autograd(given, dy, dlast if ends else torch.zeros_like(dlast), torch.float64)
    assert_gradients(assert_near, found, wanted)


@pytest.mark.parametrize(("l", "tail"), [(197, 2), (320, 2), (410, 3)])
@pytest.mark.parametrize(
    ("n", "dtype", "steps"),
    [(16, torch.float32, 64), (16, torch.float32, 32), (1, torch.bfloat16, 64)],
)
def test_the_first_chunks_may_be_handed_on_and_the_others_joined(
    operands, assert_near, l, tail, n, dtype, steps
):
    case = operands(2, l, 40, n, dtype=dtype)
    plan = backward.hand_on(64, l, tail=tail)
    assert 1 < plan.tail < plan.chunks
    whole = {name: gradient.double() for name, gradient in by_kernel(*case, 1).items()}
    found = by_kernel(*case, plan=plan, steps=steps)
    assert_gradients(assert_near, found, whole)


def test_handing_on_leaves_tokens_gradients_as_they_are(operands):
    case = operands(2, 197, 40, 16, dtype=torch.bfloat16, B="grouped", C="grouped", g=2)
    whole = by_kernel(*case, 1)
    for steps in (64, 128):
        found = by_kernel(*case, plan=backward.hand_on(steps, 197))
        for name in ("x", "dt", "B", "C", "gate", "state"):
            assert torch.equal(found[name], whole[name])


def test_handing_on_and_several_passes_go_together(operands):
    case = operands(1, 197, 100, 64)
    plan = backward.hand_on(128, 197)
    found, wanted = by_kernel(*case, plan=plan._replace(passes=2)), by_kernel(*case, plan=plan)
    for name in ("x", "dt", "A", "gate", "state"):
        assert torch.equal(found[name], wanted[name])


def test_blocks_that_are_more_than_a_gpu_runs_at_once_hand_on(operands, monkeypatch):
    monkeypatch.setattr(_cuda, "multiprocessors", lambda _: 1)
    chosen = []

    def plan(*sizes):
        chosen.append(backward.plan(*sizes))
        return chosen[-1]

    monkeypatch.setattr(backward, "_plan", plan)
    case = operands(3, 320, 40, 16)
    found, whole = by_kernel(*case), by_kernel(*case, 1)
    assert chosen[0].tail == chosen[0].chunks > 1
    for name in ("x", "dt", "B", "C", "gate", "state"):
        assert torch.equal(found[name], whole[name])


@pytest.mark.parametrize("b", [1, 2, 3, 8, 9, 20, 64, 100])
@pytest.mark.parametrize(("l", "d"), [(2048, 2048), (2047, 5120), (512, 2048), (40, 5120)])
def test_plans_cover_all_steps_in_whole_checkpoints(b, l, d):
    kinds = next(backward.specialisations())
    form = backward.Form(kinds, 8, 512, 1, 0, 4, 0, 32)
    plan = backward.plan(b, l, d, 16, 1, form, 132)
    before_last = plan.first_steps + (plan.chunks - 2) * plan.chunk_steps
    assert plan.first_steps % 64 == plan.chunk_steps % 64 == 0
    assert 0 < plan.first_steps <= plan.chunk_steps
    if plan.chunks == 1:
        assert l <= plan.first_steps
    else:
        assert before_last < l <= before_last + plan.chunk_steps
    # a chunk that hands on keeps nobody waiting: the GPU has enough to do beside it
    if plan.tail == plan.chunks > 1:
        assert b * d // 128 >= 132
    else:
        assert plan.tail == 1 or plan.tail * 132 >= b * d // 128 * plan.chunks


@pytest.mark.parametrize(
    "plan", [backward.cut(1, 140), backward.cut(2, 140), backward.hand_on(64, 140)], ids=str
)
@BOTH
def test_two_runs_give_the_same_bits(operands, plan, steps):
    case = operands(2, 140, 40, 16, dtype=torch.bfloat16)
    first, second = (by_kernel(*case, plan=plan, steps=steps) for _ in range(2))
    for name in NAMES:
        assert torch.equal(first[name], second[name])


@BOTH
def test_a_nan_stays_in_its_row(operands, steps):
    given, dy, dlast = operands(2, 70, 24, 16)
    wanted = by_kernel(given, dy, dlast, 2, steps=steps)
    dy = dy.clone()
    dy[0, 30] = torch.nan
    found = by_kernel(given, dy, dlast, 2, steps=steps)
    for name in ("x", "dt", "B", "C", "gate", "state"):
        assert torch.equal(found[name][1], wanted[name][1])
        assert found[name][0].isnan().any()
    for name in ("x", "dt", "B", "C", "gate"):
        assert torch.equal(found[name][0, 31:], wanted[name][0, 31:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@BOTH
def test_error_is_at_most_twice_that_of_eager(operands, emulated, dtype, steps):
    if dtype == torch.float32 and emulated.type == "cpu":
        pytest.skip(
            "the emulator's exp2 is as coarse as a GPU's may be, eager's on it is exact"
        )
    case = operands(2, 300, 40, 16, dtype=dtype)
    exact, eager = by_autograd(*case, torch.float64), by_autograd(*case, dtype)
    found = by_kernel(*case, 1, steps=steps)

    def error(gradients, name):
        return (gradients[name].double() - exact[name]).square().mean().sqrt().item()

    for name in NAMES:
        assert error(found, name) <= 2 * error(eager, name), name


def test_sums_over_a_long_time_keep_their_digits(operands):
    # states that are forgotten at once, and no function but + and *, whose rounding is known
    given, dy, _ = operands(
        1, 4096, 2, 16, softplus=False, without=("gate", "dt_bias", "state")
    )
    x, dt, A, B, C, D = given[:6]
    given = [x.abs() + 1, dt + 1, torch.full_like(A, -1e4), B.abs(), C.abs(), D, None]
    given += [torch.zeros_like(D), None]
    case = given, dy.abs(), None
    found = by_kernel(*case, 1, softplus=False)
    leaves = [None if t is None else t.double().requires_grad_() for t in given]
    y, _ = reference.scan(*leaves, False)
    wanted = torch.autograd.grad(y, [leaves[5], leaves[7]], case[1].double())
    for gradient, exact in zip((found["D"], found["dt_bias"]), wanted, strict=True):
        assert ((gradient.double() - exact) / exact).abs().max() < 1.5e-7


@pytest.mark.parametrize(("n", "kilobytes"), [(4, 99), (16, 99), (256, 163)])
@BOTH
def test_a_gpu_with_less_shared_memory_gets_shorter_tiles(
    operands, assert_near, monkeypatch, n, kilobytes, steps
):
    bytes_of_block = kilobytes * 1024
    monkeypatch.setattr(
        _cuda, "shared_memory", lambda _: (bytes_of_block, bytes_of_block + 1024)
    )
    case = operands(1, 70, 12, n)
    found = by_kernel(*case, 1, steps=steps)
    assert_gradients(assert_near, found, by_autograd(*case, torch.float64))


@pytest.mark.parametrize(
    ("sizes", "changed", "steps"),
    [
        ((1, 8192, 5120, 16), {}, 32),
        ((64, 512, 2048, 16), {}, 32),
        ((8, 2048, 2048, 16), {}, 64),
        ((12, 1025, 1024, 9), {}, 32),
        ((13, 1025, 1024, 9), {}, 64),  # neither short nor few channels
        ((13, 1024, 1024, 9), {}, 32),
        ((1, 65536, 1024, 16), {}, 32),
        ((1, 65537, 1024, 16), {}, 64),  # much
        ((1, 257, 8, 16), {}, 32),
        ((1, 256, 8, 16), {}, 64),  # brief
        ((1, 512, 8, 8), {}, 64),  # tiles are run twice
        ((1, 512, 8, 17), {}, 64),
        ((1, 512, 8, 16), {"dtype": torch.float32}, 64),
        ((1, 512, 8, 16), {"packed": True}, 64),
        ((1, 512, 8, 16), {"block_bytes": 163 * 1024}, 64),
    ],
)
def test_more_states_are_saved_where_nothing_is_then_run_twice(sizes, changed, steps):
    given = {"dtype": torch.bfloat16, "packed": False, "block_bytes": 227 * 1024} | changed
    assert backward.steps_to_save(*sizes, **given) == steps


def test_more_states_than_a_gpu_has_room_for_are_refused(operands, monkeypatch):
    monkeypatch.setattr(_cuda, "shared_memory", lambda _: (48 * 1024, 64 * 1024))
    case = operands(1, 5, 12, 256)
    with pytest.raises(RuntimeError, match="256 states needs"):
        by_kernel(*case)
