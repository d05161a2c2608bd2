"""The compiled scan, each build of it, against the recurrence in float64."""

import pytest
import torch

from mambakit.ops import _native
from mambakit.ops.scan import cpu, reference
from tests.ops import packs

RUNNABLE = _native.runnable()
NAMES = ("x", "dt", "A", "B", "C", "D", "gate", "dt_bias", "state")

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.skipif(not RUNNABLE, reason=str(_native.unavailable())),
]


@pytest.fixture(params=RUNNABLE)
def build(request, monkeypatch):
    """Every build that this processor can run, in the place of the best one."""
    library = _native.open_library(request.param)
    monkeypatch.setattr(_native, "library", lambda: library)
    return request.param


def recurrence(x, dt, A, B, C, D, gate, dt_bias, state, dt_softplus):
    """The definition, one step at a time."""
    b, l, d = x.shape
    n = A.shape[1]

    def coefficient(values):
        if values.ndim == 2:
            return values.expand(b, l, d, n)
        if values.ndim == 3:
            return values[:, :, None].expand(b, l, d, n)
        return values.repeat_interleave(d // values.shape[2], dim=2)

    B, C = coefficient(B), coefficient(C)
    dt = dt if dt_bias is None else dt + dt_bias
    dt = torch.nn.functional.softplus(dt) if dt_softplus else dt
    h = x.new_zeros(b, d, n) if state is None else state
    rows = []
    for t in range(l):
        h = torch.exp(dt[:, t, :, None] * A) * h + (dt[:, t] * x[:, t])[..., None] * B[:, t]
        rows.append((h * C[:, t]).sum(-1))
    y = torch.stack(rows, 1) if rows else torch.zeros_like(x)
    y = y if D is None else y + D * x
    return y if gate is None else y * torch.nn.functional.silu(gate), h


def draw(b, l, d, n, B="token", C="token", extras=True, seed=0):
    """Operands in float64 (exact in float32), in the order of NAMES; then dy and dlast."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).double()

    def coefficient(form):
        return normal(*{"constant": (d, n), "token": (b, l, n)}.get(form, (b, l, form, n)))

    operands = [
        normal(b, l, d), normal(b, l, d) - 2, -normal(d, n).exp().float().double(),
        coefficient(B), coefficient(C), *([None] * 4),
    ]  # fmt: skip
    if extras:
        operands[5:] = [normal(d), normal(b, l, d), normal(d), normal(b, d, n)]
    return operands, normal(b, l, d), normal(b, d, n)


def by_autograd(operands, dy, dlast, dtype):
    """y, last state and all gradients of the recurrence in `dtype`, as float64."""
    leaves = [None if t is None else t.to(dtype).requires_grad_() for t in operands]
    y, last = recurrence(*leaves, True)
    given = [t for t in leaves if t is not None]
    loss = (y * dy.to(dtype)).sum() + (last * dlast.to(dtype)).sum()
    found = iter(torch.autograd.grad(loss, given, materialize_grads=True))
    gradients = [None if t is None else next(found).double() for t in leaves]
    return [y.detach().double(), last.detach().double(), *gradients]


def by_kernel(operands, dy, dlast, dtype):
    leaves = [None if t is None else t.to(dtype) for t in operands]
    y, last, checkpoints = cpu.forward(*leaves, True, True)
    gradients = cpu.backward(dy.to(dtype), dlast.to(dtype), *leaves, checkpoints, True)
    ordered = dict(zip(("x", "dt", "A", "B", "C", "D", "gate", "dt_bias", "state"),
                       gradients, strict=True))  # fmt: skip
    return [
        t if t is None else t.double() for t in (y, last, *(ordered[name] for name in NAMES))
    ]


SHAPES = [(2, 70, 33, 5), (1, 129, 16, 16), (2, 1, 7, 4), (3, 65, 48, 1), (1, 64, 3, 17)]
FORMS = [
    ("token", "token"), ("constant", "token"), ("token", "constant"), ("constant", "constant"),
    (1, "token"), (3, "token"), ("token", 3), (3, 3),
]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("extras", [True, False])
def test_float64_equals_the_definition(build, shape, extras):
    case = draw(*shape, extras=extras)
    for found, wanted in zip(
        by_kernel(*case, torch.float64), by_autograd(*case, torch.float64), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("B", "C"), FORMS, ids=str)
def test_every_form_of_the_coefficients(build, B, C):
    case = draw(2, 67, 33, 5, B, C)
    for found, wanted in zip(
        by_kernel(*case, torch.float64), by_autograd(*case, torch.float64), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)


def test_error_is_at_most_twice_that_of_eager(build):
    kernel, eager = torch.zeros(11), torch.zeros(11)
    for seed in range(3):
        case = draw(1, 300, 40, 16, seed=seed)
        exact = by_autograd(*case, torch.float64)
        for errors, results in (
            (kernel, by_kernel(*case, torch.float32)),
            (eager, by_autograd(*case, torch.float32)),
        ):
            for i, (found, wanted) in enumerate(zip(results, exact, strict=True)):
                errors[i] += ((found - wanted).square().mean() / wanted.square().mean()).float()
    assert (kernel.sqrt() <= 2 * eager.sqrt()).all(), (kernel / eager).sqrt()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_float32_but_for_rounding(build, dtype):
    operands, dy, dlast = draw(2, 70, 33, 16)
    halves = [
        t if t is None or i in {2, 5, 7, 8} else t.to(dtype) for i, t in enumerate(operands)
    ]
    found = cpu.forward(*halves, True, True)
    wanted = cpu.forward(*(None if t is None else t.float() for t in halves), True, True)
    assert found[0].dtype == dtype
    assert found[1].dtype == torch.float32
    assert torch.equal(found[0], wanted[0].to(dtype))
    assert torch.equal(found[1], wanted[1])

    left = cpu.backward(dy.to(dtype), dlast, *halves, found[2], True)
    right = cpu.backward(
        dy.to(dtype).float(), dlast, *(None if t is None else t.float() for t in halves),
        wanted[2], True,
    )  # fmt: skip
    for a, b in zip(left, right, strict=True):
        assert torch.equal(a, b.to(a.dtype))


def test_cutting_the_sequence_over_threads_changes_rounding_only(build, monkeypatch):
    case = draw(1, 1000, 5, 6)
    exact = by_autograd(*case, torch.float64)
    for threads in (1, 2, 5, 16):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        for found, wanted in zip(by_kernel(*case, torch.float64), exact, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("lengths", [[5] * 60, [300, 1, 7, 200], [24, 48, 25, 1000]], ids=str)
@pytest.mark.parametrize("d", [5, 70])
def test_a_pack_over_threads_is_its_sequences_in_the_reference(build, monkeypatch, lengths, d):
    """Also where its cuts in time fall into a sequence, or beside one."""
    l, cu_seqlens = sum(lengths), packs.ends(lengths)
    operands, dy, _ = draw(1, l, d, 6)
    operands[8], dlast = (torch.randn(2, len(lengths), d, 6).double()).unbind()
    leaves = [t.requires_grad_() for t in operands]
    exact = reference.scan(*leaves, True, cu_seqlens=cu_seqlens)
    wanted = [*exact, *torch.autograd.grad(exact, leaves, (dy, dlast))]
    operands = [t.detach() for t in operands]
    for threads in (1, 2, 5, 16):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        y, last, kept = cpu.forward(*operands, True, True, cu_seqlens=cu_seqlens)
        found = cpu.backward(dy, dlast, *operands, kept, True, cu_seqlens=cu_seqlens)
        for a, b in zip((y, last, *found), wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_backward_repeats_bit_for_bit(build):
    case = draw(2, 200, 70, 16)
    for first, second in zip(
        by_kernel(*case, torch.float32), by_kernel(*case, torch.float32), strict=True
    ):
        assert torch.equal(first, second)


def test_slices_of_wider_tensors_are_read_in_place(build):
    operands, dy, dlast = draw(2, 40, 33, 5)
    wide = [None if t is None else t.float() for t in operands]
    for i in (0, 1, 3, 4, 6):
        parent = torch.full((*wide[i].shape[:-1], wide[i].shape[-1] + 9), torch.nan)
        parent[..., 4:-5] = wide[i]
        wide[i] = parent[..., 4:-5]
    dense = [None if t is None else t.float() for t in operands]
    for found, wanted in zip(
        by_kernel(wide, dy, dlast, torch.float32),
        by_kernel(dense, dy, dlast, torch.float32),
        strict=True,
    ):
        assert torch.equal(found, wanted)


def test_transposed_and_expanded_tensors_are_read(build):
    operands, dy, dlast = draw(2, 40, 33, 5)
    operands[1] = operands[1][:, :, :1].expand(-1, -1, 33)
    odd = list(operands)
    odd[0] = odd[0].transpose(1, 2).contiguous().transpose(1, 2)
    plain = [None if t is None else t.contiguous() for t in operands]
    for found, wanted in zip(
        by_kernel(odd, dy, dlast, torch.float64),
        by_kernel(plain, dy, dlast, torch.float64),
        strict=True,
    ):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("value", [1e30, 3e38])
def test_a_huge_step_forgets_and_a_step_of_zero_remembers(build, value):
    A, ones = -torch.ones(20, 3), torch.ones(1, 2, 3)
    x, state = torch.zeros(1, 2, 20), torch.full((1, 20, 3), 2.0**100)
    dt = torch.tensor([0.0, value]).view(1, 2, 1).expand(1, 2, 20).contiguous()

    y, last, _ = cpu.forward(x, dt, A, ones, ones, None, None, None, state, False, False)

    assert torch.equal(y[:, 0], torch.full((1, 20), 3 * 2.0**100))
    assert torch.equal(last, torch.zeros(1, 20, 3))


def test_a_nan_stays_in_its_channel_and_after_its_step(build):
    operands, _, _ = draw(2, 100, 33, 5)
    floats = [None if t is None else t.float() for t in operands]
    clean = cpu.forward(*floats, True, False)
    floats[0] = floats[0].clone()
    floats[0][1, 40, 20] = torch.nan
    y, last, _ = cpu.forward(*floats, True, False)

    touched = torch.zeros(2, 100, 33, dtype=torch.bool)
    touched[1, 40:, 20] = True
    assert torch.equal(y.isnan(), touched)
    assert torch.equal(y[~touched], clean[0][~touched])
    assert last[1, 20].isnan().all()
    assert int(last.isnan().sum()) == 5


@pytest.mark.parametrize(("b", "l"), [(0, 5), (2, 0)])
def test_nothing_to_do(build, b, l):
    operands, dy, dlast = draw(b, l, 7, 3)
    y, last, *gradients = by_kernel(operands, dy, dlast, torch.float32)
    assert y.shape == (b, l, 7)
    assert torch.equal(last, operands[8].float().double())
    assert torch.equal(gradients[8], dlast.float().double())
    assert all(not g.any() for g in gradients[:8])


def test_checkpoints_are_the_states_before_each_tile(build):
    d, n, width = 17, 4, {"avx512": 8, "avx2": 4}.get(build, 2)  # channels in a vector, float64
    operands, _, _ = draw(1, 2 * cpu.TILE_STEPS + 3, d, n)
    _, _, checkpoints = cpu.forward(*operands, True, True)
    assert checkpoints.shape == cpu.checkpoint_shape(1, 2 * cpu.TILE_STEPS + 3, d, n)
    for tile in range(3):
        cut = tile * cpu.TILE_STEPS
        part = [
            t if t is None or t.ndim != 3 or i == 8 else t[:, :cut]
            for i, t in enumerate(operands)
        ]
        _, state = recurrence(*part, True)
        blocks = [block.T.flatten() for block in state[0].split(width)]
        torch.testing.assert_close(checkpoints[0, tile].flatten(), torch.cat(blocks))


def test_the_library_and_python_agree_on_the_tile(build):
    assert _native.library().mk_scan_tile_steps() == cpu.TILE_STEPS
