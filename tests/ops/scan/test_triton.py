"""The scan in Triton against the definition: on a GPU, or in Triton's interpreter without one.

The interpreter takes a millisecond for what a GPU does in a microsecond, so cases are small.
"""

import re

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton", reason="needs Triton, which PyTorch brings for GPUs")

from mambakit.ops import _backends, selective_scan  # noqa: E402
from mambakit.ops.scan import reference, triton as kernel  # noqa: E402

NAMES = ("x", "dt", "A", "B", "C", "D", "gate", "dt_bias", "state")
EXTRAS = ("D", "gate", "dt_bias", "state")


def version(module):
    return tuple(int(part) for part in re.findall(r"\d+", module.__version__)[:2])


@pytest.fixture(autouse=True)
def where_triton_runs(device):
    if device.type != "cpu":
        return
    if isinstance(triton.language.sum, triton.JITFunction):
        pytest.skip("needs a GPU, or TRITON_INTERPRET=1 before Triton is imported")
    if version(triton) < (3, 7) and version(np) >= (2, 4):
        pytest.skip("Triton's interpreter before 3.7 cannot loop with NumPy 2.4 or later")


def operands(inputs, dtype=None):
    """The inputs in the order of NAMES, on the device."""
    given = [inputs.get(name) for name in NAMES]
    return [None if t is None else t.to(torch.get_default_device(), dtype) for t in given]


def arriving(inputs, seed=1):
    """A gradient for y and one for the last state."""
    b, _, d = inputs["x"].shape
    generator = torch.Generator().manual_seed(seed)
    dy = torch.randn(inputs["x"].shape, generator=generator, device="cpu").double()
    dlast = torch.randn(b, d, inputs["A"].shape[1], generator=generator, device="cpu").double()
    return dy, dlast


def by_autograd(inputs, dtype=torch.float64):
    """What the definition gives: y, the last state and the gradients, as float64."""
    leaves = [None if t is None else t.requires_grad_() for t in operands(inputs, dtype)]
    dy, dlast = (t.to(torch.get_default_device(), dtype) for t in arriving(inputs))
    y, last = reference.scan(*leaves, inputs["dt_softplus"])
    given = [t for t in leaves if t is not None]
    found = iter(torch.autograd.grad((y, last), given, (dy, dlast)))
    gradients = [None if t is None else next(found) for t in leaves]
    return [t if t is None else t.detach().double() for t in (y, last, *gradients)]


def by_kernel(inputs, dtype=torch.float64):
    return [
        t if t is None else t.double()
        for t in run(operands(inputs, dtype), *arriving(inputs), inputs["dt_softplus"])
    ]


def run(tensors, dy, dlast, softplus=True):
    x = tensors[0]
    y, last, checkpoints = kernel.forward(*tensors, softplus, True)
    dlast = None if dlast is None else dlast.to(last)
    gradients = kernel.backward(dy.to(x), dlast, *tensors, checkpoints, softplus)
    return y, last, *gradients


def assert_equal(found, wanted, tolerance):
    for name, left, right in zip(
        ("y", "last", *(f"d{name}" for name in NAMES)), found, wanted, strict=True
    ):
        if right is None:
            assert left is None, name
        else:
            torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("without", [(), EXTRAS], ids=["all", "bare"])
@pytest.mark.parametrize(
    ("b", "l", "d", "n"),
    [
        (2, 1, 1, 1), (1, 17, 24, 16), (2, 15, 3, 5), (1, 65, 2, 3), (1, 16, 70, 1),
        (2, 4, 40, 20),
    ],
)  # fmt: skip
def test_float64_equals_the_definition(draw, b, l, d, n, without):
    inputs = draw(b, l, d, n, without=without)
    assert_equal(by_kernel(inputs), by_autograd(inputs), 1e-11)


@pytest.mark.parametrize(("d", "n"), [(40, 64), (33, 256)])
def test_blocks_take_turns_at_the_sums_of_many_states(draw, d, n):
    inputs = draw(1, 5, d, n)
    assert_equal(by_kernel(inputs), by_autograd(inputs), 1e-11)


@pytest.mark.parametrize("B", ["token", "constant", "grouped"])
@pytest.mark.parametrize("C", ["token", "constant", "grouped"])
def test_every_form_of_the_coefficients(draw, B, C):
    inputs = draw(1, 5, 6, 5, B=B, C=C)
    assert_equal(by_kernel(inputs), by_autograd(inputs), 1e-11)


def test_a_group_for_each_channel_and_groups_of_several_blocks(draw):
    for g, d in ((5, 5), (2, 38)):
        inputs = draw(1, 7, d, 16, B="grouped", g=g)
        assert_equal(by_kernel(inputs), by_autograd(inputs), 1e-11)


def test_a_step_that_is_given_as_it_is(draw):
    inputs = draw(1, 11, 5, 3) | {"dt_softplus": False}
    assert_equal(by_kernel(inputs), by_autograd(inputs), 1e-11)


def test_error_is_at_most_twice_that_of_eager(draw):
    found, eager = torch.zeros(11), torch.zeros(11)
    for seed in range(2):
        inputs = draw(1, 40, 16, 16, seed=seed)
        exact = by_autograd(
            {k: v.float() if torch.is_tensor(v) else v for k, v in inputs.items()}
        )
        for errors, results in (
            (found, by_kernel(inputs, torch.float32)),
            (eager, by_autograd(inputs, torch.float32)),
        ):
            for i, (got, wanted) in enumerate(zip(results, exact, strict=True)):
                errors[i] += ((got - wanted).square().mean() / wanted.square().mean()).cpu()
    assert (found.sqrt() <= 2 * eager.sqrt()).all(), (found / eager).sqrt()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_float32_but_for_rounding(draw, dtype):
    inputs = draw(1, 9, 20, 16)
    halves = [
        t
        if t is None
        else t.to(dtype if name in {"x", "dt", "B", "C", "gate"} else torch.float32)
        for name, t in zip(NAMES, operands(inputs), strict=True)
    ]
    dy, dlast = arriving(inputs)
    found = run(halves, dy, dlast)
    wanted = run([t.float() for t in halves], dy.to(dtype), dlast)

    assert found[0].dtype == dtype
    assert found[1].dtype == torch.float32
    for left, right in zip(found, wanted, strict=True):
        # the interpreter rounds towards zero, GPUs to the nearest
        unit = torch.finfo(left.dtype).eps
        torch.testing.assert_close(left.float(), right, rtol=unit, atol=1e-6)


def test_backward_repeats_bit_for_bit(draw):
    inputs = draw(1, 9, 20, 16)
    for first, second in zip(
        by_kernel(inputs, torch.float32), by_kernel(inputs, torch.float32), strict=True
    ):
        assert torch.equal(first, second)


def test_rows_with_gaps_and_tensors_that_are_not_dense_are_read(draw):
    inputs = draw(2, 4, 21, 5)
    dense = operands(inputs, torch.float32)
    odd = list(dense)
    for i in (0, 1, 3, 4, 6):
        parent = torch.full((*dense[i].shape[:-1], dense[i].shape[-1] + 9), torch.nan)
        parent = parent.to(torch.get_default_device())
        parent[..., 4:-5] = dense[i]
        odd[i] = parent[..., 4:-5]
    odd[2] = dense[2].T.contiguous().T
    odd[8] = dense[8].transpose(1, 2).contiguous().transpose(1, 2)
    dy, dlast = arriving(inputs)
    for found, wanted in zip(run(odd, dy, dlast), run(dense, dy, dlast), strict=True):
        assert torch.equal(found, wanted)

    odd[0] = dense[0].transpose(1, 2).contiguous().transpose(1, 2)
    odd[1] = dense[1][:, :, :1].expand(-1, -1, 21)
    plain = [t.contiguous() for t in odd]
    for found, wanted in zip(run(odd, dy, dlast), run(plain, dy, dlast), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("form", ["token", "constant", "grouped"])
def test_each_sequence_of_a_pack_is_what_it_is_alone(draw, monkeypatch, form):
    monkeypatch.setattr(kernel, "_MOST_PROGRAMS", 3)  # so that the sequences take turns
    lengths = (1, 9, 66, 1, 3)
    places = torch.tensor([0, *lengths], device="cpu").cumsum(0)
    inputs = draw(1, sum(lengths), 6, 3, B=form, C=form)
    inputs["state"] = draw(len(lengths), 1, 6, 3)["state"]
    tensors = operands(inputs)
    dy, _ = (t.to(torch.get_default_device()) for t in arriving(inputs))
    dlast = tensors[8].flip(0)
    y, last, saved = kernel.forward(*tensors, True, True, cu_seqlens=places)
    found = kernel.backward(dy, dlast, *tensors, saved.view(-1), True, cu_seqlens=places)
    sums = [0.0] * 9
    for k, l in enumerate(lengths):
        a = int(places[k])
        own = [t[:, a : a + l] if i in {0, 1, 3, 4, 6} and t.ndim > 2 else t
               for i, t in enumerate(tensors)]  # fmt: skip
        own[8] = tensors[8][k : k + 1]
        wanted = run(own, dy[:, a : a + l], dlast[k : k + 1])
        assert torch.equal(y[:, a : a + l], wanted[0])
        assert torch.equal(last[k : k + 1], wanted[1])
        for i, gradient in enumerate(wanted[2:]):
            if i == 8:
                assert torch.equal(found[i][k : k + 1], gradient)
            elif gradient.ndim > 2:
                assert torch.equal(found[i][:, a : a + l], gradient)
            else:
                sums[i] = sums[i] + gradient
    for gradient, wanted in zip(found, sums, strict=True):
        if torch.is_tensor(wanted):
            torch.testing.assert_close(gradient, wanted, rtol=1e-11, atol=1e-11)


def test_nothing_need_arrive_at_the_last_state(draw):
    inputs = draw(1, 6, 4, 3)
    dy, dlast = arriving(inputs)
    tensors = operands(inputs)
    for found, wanted in zip(
        run(tensors, dy, None), run(tensors, dy, torch.zeros_like(dlast)), strict=True
    ):
        assert torch.equal(found, wanted)


def test_a_huge_step_forgets_and_a_step_of_zero_remembers():
    A, ones = -torch.ones(20, 3), torch.ones(1, 2, 3)
    x, state = torch.zeros(1, 2, 20), torch.full((1, 20, 3), 2.0**100)
    dt = torch.tensor([0.0, 3e38]).view(1, 2, 1).expand(1, 2, 20)
    given = (x, dt, A, ones, ones, None, None, None, state)

    y, last, checkpoints = kernel.forward(*given, False, False)

    assert torch.equal(y[:, 0], torch.full((1, 20), 3 * 2.0**100))
    assert torch.equal(last, torch.zeros(1, 20, 3))
    assert checkpoints.numel() == 0


def test_a_nan_stays_in_its_channel_and_after_its_step(draw):
    tensors = operands(draw(2, 12, 33, 5), torch.float32)
    clean, _, _ = kernel.forward(*tensors, True, False)
    tensors[0][1, 7, 20] = torch.nan
    y, last, _ = kernel.forward(*tensors, True, False)

    touched = torch.zeros(2, 12, 33, dtype=torch.bool, device=y.device)
    touched[1, 7:, 20] = True
    assert torch.equal(y.isnan(), touched)
    assert torch.equal(y[~touched], clean[~touched])
    assert last[1, 20].isnan().all()
    assert int(last.isnan().sum()) == 5


def test_checkpoints_are_the_states_before_each_tile(draw):
    inputs = draw(1, 2 * kernel.CHECKPOINT_STEPS + 3, 5, 4)
    tensors = operands(inputs)
    _, _, checkpoints = kernel.forward(*tensors, True, True)
    assert checkpoints.shape == kernel.checkpoint_shape(
        1, 2 * kernel.CHECKPOINT_STEPS + 3, 5, 4
    )
    for tile in range(3):
        cut = tile * kernel.CHECKPOINT_STEPS
        part = [t[:, :cut] if i in {0, 1, 3, 4, 6} else t for i, t in enumerate(tensors)]
        _, state = reference.scan(*part, True)
        torch.testing.assert_close(checkpoints[:, tile], state)


def test_the_operator_takes_it_where_the_cuda_kernels_cannot_run(draw, monkeypatch, device):
    if device.type == "cpu":
        pytest.skip("needs a GPU, for which it is chosen")
    monkeypatch.setattr(_backends, "_why_not_cuda", lambda index: "this is a test")
    calls, run = [], kernel.backward
    monkeypatch.setattr(kernel, "backward", lambda *a, **k: calls.append(1) or run(*a, **k))
    inputs = draw(2, 70, 6, 5)
    leaves = [v.requires_grad_() for v in inputs.values() if torch.is_tensor(v)]
    outputs = [selective_scan(**inputs, backend=backend) for backend in ("fused", "reference")]
    found, wanted = (
        (*out, *torch.autograd.grad(out.y.sum() + out.state.sum(), leaves)) for out in outputs
    )
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    assert calls == [1]
