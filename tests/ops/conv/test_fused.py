"""The convolution as a registered operator: registration, tracing, second derivatives."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from mambakit.ops import causal_conv1d
from tests.ops import packs

pytestmark = pytest.mark.usefixtures("fused")


@pytest.mark.compiles
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("optional", [False, True])
@pytest.mark.parametrize("l", [7, 1, 0])
@pytest.mark.compiles
def test_registration_is_sound(draw, requires_grad, optional, l):
    x, weight, bias, state = draw(l=l, dtype=torch.float32)
    inputs = [x, weight, bias if optional else None, state if optional else None]
    for t in inputs:
        if t is not None:
            t.requires_grad_(requires_grad)
    torch.library.opcheck(torch.ops.mambakit.causal_conv1d.default, (*inputs, None, True))
    detached = [None if t is None else t.detach() for t in inputs]
    dlast = torch.randn(2, 3, 3) if optional else None
    torch.library.opcheck(
        torch.ops.mambakit.causal_conv1d_backward.default,
        (torch.randn(2, l, 3), dlast, *detached, None, True),
    )


@pytest.mark.compiles
@pytest.mark.parametrize("l", [7, 0])
def test_the_gradient_of_x_is_written_where_it_is_wanted(draw, l):
    x, weight, bias, state = draw(l=l, dtype=torch.float32)
    call = (torch.randn(2, l, 3), torch.randn(2, 3, 3), x, weight, bias, state, None, True)
    operator = torch.ops.mambakit.causal_conv1d_backward
    wanted = operator(*call)
    wide = torch.zeros(2, l, 6)
    found = operator.into(*call, dx=wide[..., 3:])
    assert torch.equal(wide[..., 3:], wanted[0])
    assert not wide[..., :3].any()
    torch.testing.assert_close(found, wanted[1:], rtol=0, atol=0)
    torch.library.opcheck(operator.into, call, {"dx": wide[..., 3:]})


def test_derivatives_by_torch_func_are_refused(draw):
    x, weight, _, _ = draw()

    def loss(x):
        return causal_conv1d(x, weight, backend="fused").y.sum()

    for transform in (torch.func.grad, torch.func.jacrev):
        with pytest.raises(
            RuntimeError,
            match=r"^causal_conv1d: derivatives by torch\.func exist only with backend='ref",
        ):
            transform(loss)(x)


@pytest.mark.compiles
def test_registration_is_sound_when_dtypes_differ(draw):
    x, weight, bias, state = draw(dtype=torch.float32)
    x, bias = x.bfloat16(), bias.double()
    inputs = [t.requires_grad_() for t in (x, weight, bias, state)]
    torch.library.opcheck(torch.ops.mambakit.causal_conv1d.default, (*inputs, None, True))
    y, last = causal_conv1d(x, weight, bias, activation="silu", state=state, backend="fused")
    gradients = torch.autograd.grad(y.sum() + last.sum(), inputs)
    assert [g.dtype for g in gradients] == [t.dtype for t in inputs]


def test_a_second_derivative_is_refused(draw):
    x, weight, bias, _ = draw()
    x.requires_grad_()
    y = causal_conv1d(x, weight, bias, activation="silu", backend="fused").y
    with pytest.raises(RuntimeError, match="second derivatives exist only with backend"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


def test_forward_mode_is_refused(draw):
    inputs = draw()
    sentence = "^causal_conv1d: forward-mode derivatives exist only with backend='reference'$"
    for i, t in enumerate(inputs):
        with torch.autograd.forward_ad.dual_level():
            for mode in (torch.enable_grad, torch.no_grad):
                dual = torch.autograd.forward_ad.make_dual(t, torch.ones_like(t))
                x, weight, bias, state = (*inputs[:i], dual, *inputs[i + 1 :])
                with mode(), pytest.raises(RuntimeError, match=sentence):
                    causal_conv1d(x, weight, bias, state=state, backend="fused")
    with pytest.raises(RuntimeError, match=sentence):
        torch.func.jvp(
            lambda x: causal_conv1d(x, *inputs[1:3], backend="fused").y, inputs[:1], inputs[:1]
        )


def test_the_reference_has_forward_mode(draw, assert_near):
    """It is linear without an activation: the derivative along an input is its own output."""
    x, weight, _, _ = draw()
    y, along = torch.func.jvp(
        lambda x: causal_conv1d(x, weight, backend="reference").y, (x,), (2 * x,)
    )
    assert_near(along, 2 * y)


def test_the_reference_has_second_derivatives(draw):
    x, weight, bias, state = (t.requires_grad_() for t in draw(b=1, l=4, d=2, w=3))
    assert torch.autograd.gradgradcheck(
        lambda *a: causal_conv1d(*a[:3], activation="silu", state=a[3], backend="reference"),
        (x, weight, bias, state),
    )


def test_only_the_state_may_ask_for_gradients(draw, assert_near):
    x, weight, bias, state = draw(l=2)
    state.requires_grad_()
    last = causal_conv1d(x, weight, bias, state=state, backend="fused").state
    (gradient,) = torch.autograd.grad(last.sum(), state)
    assert_near(gradient, torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64).expand(2, 3, 3))


@pytest.mark.compiles
def test_compiles_to_one_graph_for_all_lengths(draw, assert_near):
    count = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=count)
    def run(x, weight, bias, state):
        y, last = causal_conv1d(x, weight, bias, activation="silu", state=state)
        return y * 2, last

    for l in (5, 64, 129):
        inputs = [t.requires_grad_() for t in draw(l=l, dtype=torch.float32)]
        torch._dynamo.mark_dynamic(inputs[0], 1)
        x, weight, bias, state = inputs
        compiled = run(*inputs)
        eager = causal_conv1d(x, weight, bias, activation="silu", state=state)
        assert_near(compiled[0], eager.y * 2)
        assert torch.equal(compiled[1], eager.state)
        got = torch.autograd.grad((compiled[0].sum(), compiled[1].sum()), inputs)
        wanted = torch.autograd.grad((2 * eager.y.sum(), eager.state.sum()), inputs)
        for g, w in zip(got, wanted, strict=True):
            assert_near(g, w)
    assert count.frame_count == 1


@pytest.mark.compiles
def test_inductor_keeps_the_layout_of_the_state(draw):
    x, weight, bias, state = draw(dtype=torch.float32)

    @torch.compile(fullgraph=True)
    def run(x, state):
        y, last = causal_conv1d(2 * x, weight, bias, state=state)
        return causal_conv1d(y, weight, bias, state=last)

    got, wanted = run(x, state), causal_conv1d(2 * x, weight, bias, state=state)
    wanted = causal_conv1d(wanted.y, weight, bias, state=wanted.state)
    assert torch.equal(got.y, wanted.y)
    assert torch.equal(got.state, wanted.state)
    assert got.state.stride() == wanted.state.stride()


@pytest.mark.compiles
def test_exports_with_a_dynamic_length(draw, assert_near):
    class Filter(torch.nn.Module):
        def forward(self, x, weight, bias):
            return causal_conv1d(x, weight, bias, activation="silu")

    x, weight, bias, _ = draw(dtype=torch.float32)
    length = torch.export.Dim("length", min=1)
    program = torch.export.export(
        Filter(), (x, weight, bias), dynamic_shapes=({1: length}, None, None)
    )
    longer = torch.randn(2, 50, 3)
    got = program.module()(longer, weight, bias)
    assert_near(got[0], causal_conv1d(longer, weight, bias, activation="silu").y)


@pytest.mark.compiles
def test_registration_is_sound_for_packs(draw):
    x, weight, bias, _ = draw(b=1, dtype=torch.float32)
    state, cu_seqlens = torch.randn(3, 3, 3), packs.ends([4, 1, 4])
    inputs = [t.requires_grad_() for t in (x, weight, bias, state)]
    operator = torch.ops.mambakit.causal_conv1d.default
    torch.library.opcheck(operator, (*inputs, cu_seqlens, True))
    detached = [t.detach() for t in inputs]
    torch.library.opcheck(
        torch.ops.mambakit.causal_conv1d_backward.default,
        (torch.randn(1, 9, 3), torch.randn(3, 3, 3), *detached, cu_seqlens, True),
    )


@pytest.mark.compiles
@pytest.mark.parametrize("backend", ["fused", "parallel"])
def test_compiles_to_one_graph_for_every_packing(draw, assert_near, backend):
    torch._dynamo.reset()
    count = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(causal_conv1d, fullgraph=True, backend=count)
    x, weight, bias, _ = draw(b=1, dtype=torch.float32)
    inputs = [t.requires_grad_() for t in (x, weight, bias)]
    for lengths in ([4, 1, 4], [1, 7, 1]):
        how = {"cu_seqlens": packs.ends(lengths), "backend": backend}
        eager, got = causal_conv1d(*inputs, **how), compiled(*inputs, **how)
        assert_near(got.y, eager.y)
        assert torch.equal(got.state, eager.state)
        for g, w in zip(
            torch.autograd.grad(got.y.sum(), inputs),
            torch.autograd.grad(eager.y.sum(), inputs),
            strict=True,
        ):
            assert_near(g, w)
    assert count.frame_count == 1


@pytest.mark.compiles
@pytest.mark.parametrize("backend", ["fused", "parallel"])
@pytest.mark.parametrize(
    ("cu_seqlens", "what"),
    [
        ([0, 4, 8], "end at l=9, got 8$"),
        ([2, 5, 11], "start at 0, got 2$"),
        ([0, 4, 4, 9], "rise, got 4 after 4 at index 2$"),
    ],
)
def test_a_compiled_call_looks_at_the_values_of_cu_seqlens(draw, backend, cu_seqlens, what):
    torch._dynamo.reset()
    x, weight, _, _ = draw(b=1)
    compiled = torch.compile(causal_conv1d, fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match=f"causal_conv1d: cu_seqlens must {what}"):
        compiled(x, weight, cu_seqlens=torch.tensor(cu_seqlens), backend=backend)
