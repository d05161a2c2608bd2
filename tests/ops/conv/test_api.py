"""Laws that every backend of the causal convolution obeys."""

import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

from mambakit.ops import causal_conv1d, causal_conv1d_step
from mambakit.ops.conv import reference

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("activation", [None, "silu"])
def test_is_pytorchs_convolution_of_the_padded_input(backend, draw, assert_near, activation):
    x, weight, bias, state = draw(l=12, d=5)
    y = causal_conv1d(x, weight, bias, activation=activation, state=state, backend=backend).y
    padded = torch.cat([state, x.mT], dim=2)
    wanted = F.conv1d(padded, weight[:, None], bias, groups=5).mT
    assert_near(y, F.silu(wanted) if activation else wanted)


def test_one_tap_scales_the_present_input(backend, draw, assert_near):
    x, weight, bias, state = draw(w=1)
    y, last = causal_conv1d(x, weight, bias, state=state, backend=backend)
    assert_near(y, weight[:, 0] * x + bias)
    assert last.shape == (2, 3, 0)


def test_state_is_the_last_inputs_oldest_first(backend, draw):
    x, weight, _, state = draw()
    long = causal_conv1d(x, weight, state=state, backend=backend).state
    assert torch.equal(long, x[:, -3:].mT)
    short = causal_conv1d(x[:, :1], weight, state=state, backend=backend).state
    assert torch.equal(short, torch.cat([state[..., 1:], x[:, :1].mT], dim=2))


def test_no_steps_pass_the_state_on(backend, draw):
    x, weight, bias, state = draw(l=0)
    state.requires_grad_()
    y, last = causal_conv1d(x, weight, bias, state=state, backend=backend)
    assert y.shape == (2, 0, 3)
    assert torch.equal(last, state)
    (gradient,) = torch.autograd.grad(last.sum(), state)
    assert torch.equal(gradient, torch.ones_like(state))


def test_no_sequences_give_no_output(backend, draw):
    x, weight, bias, state = draw(b=0)
    y, last = causal_conv1d(x, weight, bias, state=state, backend=backend)
    assert y.shape == (0, 9, 3)
    assert last.shape == (0, 3, 3)


@settings(deadline=None, max_examples=30)
@given(l=st.integers(1, 40), w=st.integers(1, 6), given_state=st.booleans(), data=st.data())
def test_cutting_the_sequence_changes_nothing(
    backend, draw, assert_near, l, w, given_state, data
):
    cut = data.draw(st.integers(0, l))
    x, weight, bias, state = draw(l=l, w=w)
    state = state if given_state else None
    run = {"activation": "silu", "backend": backend}
    whole = causal_conv1d(x, weight, bias, state=state, **run)
    left = causal_conv1d(x[:, :cut], weight, bias, state=state, **run)
    right = causal_conv1d(x[:, cut:], weight, bias, state=left.state, **run)
    assert_near(torch.cat([left.y, right.y], dim=1), whole.y)
    assert torch.equal(right.state, whole.state)


def test_stepping_is_the_convolution(backend, draw, assert_near):
    x, weight, bias, state = draw()
    run = {"activation": "silu", "backend": backend}
    whole = causal_conv1d(x, weight, bias, state=state, **run)
    for t in range(x.shape[1]):
        before = state.clone()
        y, after = causal_conv1d_step(x[:, t], weight, bias, state=state, **run)
        assert torch.equal(state, before)
        assert_near(y, whole.y[:, t])
        state = after
    assert torch.equal(state, whole.state)


def test_the_future_does_not_touch_the_past(backend, draw):
    x, weight, bias, state = draw(l=30)
    later = x.clone()
    later[:, 17:] += 1
    one = causal_conv1d(x, weight, bias, state=state, backend=backend).y
    other = causal_conv1d(later, weight, bias, state=state, backend=backend).y
    assert torch.equal(one[:, :17], other[:, :17])
    assert not torch.equal(one[:, 17], other[:, 17])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("w", [1, 3, 4])
def test_a_nan_reaches_the_w_steps_from_its_own_and_nothing_else(backend, draw, dtype, w):
    x, weight, bias, _ = draw(b=2, l=30, d=19, w=w, dtype=dtype)
    run = {"activation": "silu", "backend": backend}
    clean, last = causal_conv1d(x, weight, bias, **run)
    x[1, 11, 7] = torch.nan
    y, state = causal_conv1d(x, weight, bias, **run)
    touched = torch.zeros_like(y, dtype=torch.bool)
    touched[1, 11 : 11 + w, 7] = True
    assert torch.equal(y.isnan(), touched)
    assert torch.equal(y[~touched], clean[~touched])
    assert torch.equal(state, last)


def test_a_nans_gradient_stays_in_its_channel(backend, draw):
    x, weight, bias, _ = draw(b=2, l=30, d=19)
    x[1, 11, 7] = torch.nan
    inputs = [t.requires_grad_() for t in (x, weight, bias)]
    y = causal_conv1d(*inputs, activation="silu", backend=backend).y
    dx, dweight, dbias = torch.autograd.grad(y.sum(), inputs)
    assert set(dx.isnan().nonzero()[:, 2].tolist()) == {7}
    assert set(dx.isnan().nonzero()[:, 0].tolist()) == {1}
    assert dweight.isnan().any(1).nonzero().flatten().tolist() == [7]
    assert dbias.isnan().nonzero().flatten().tolist() == [7]


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize(
    ("l", "w", "with_bias", "with_state"),
    [(6, 4, True, True), (2, 4, True, True), (5, 1, False, False), (5, 3, True, False)],
)
def test_gradients_match_finite_differences(
    backend, draw, activation, l, w, with_bias, with_state
):
    x, weight, bias, state = draw(b=2, l=l, d=2, w=w)
    inputs = [x, weight, bias if with_bias else None, state if with_state else None]
    live = [t.requires_grad_() for t in inputs if t is not None and t.numel()]

    def run(*_):
        x, weight, bias, state = inputs
        return causal_conv1d(
            x, weight, bias, activation=activation, state=state, backend=backend
        )

    assert torch.autograd.gradcheck(run, live, fast_mode=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("l", "d", "w"), [(300, 33, 4), (140, 530, 4), (33, 16, 7), (5, 1, 2)])
def test_is_as_accurate_as_eager_in_the_same_precision(fast_backend, draw, dtype, l, d, w):
    """Output and every gradient: at most twice the error of PyTorch's own operations."""
    rough = draw(l=l, d=d, w=w, dtype=dtype)
    dy, dstate = torch.randn(2, l, d, dtype=dtype), torch.randn(2, d, w - 1, dtype=dtype)

    def run(inputs, backend):
        x, weight, bias, state = live = [t.clone().requires_grad_() for t in inputs]
        out = causal_conv1d(x, weight, bias, activation="silu", state=state, backend=backend)
        loss = [dy.to(x.dtype), dstate.to(x.dtype)]
        return (*out, *torch.autograd.grad(out, live, loss))

    truth = run([t.double() for t in rough], "reference")
    eager = run(rough, "reference")
    fast = run(rough, fast_backend)
    for exact, allowed, got in zip(truth, eager, fast, strict=True):
        size = exact.abs().max()
        budget = 2 * (allowed.double() - exact).abs().max() + torch.finfo(dtype).eps * size
        assert (got.double() - exact).abs().max() <= budget
        assert got.dtype == dtype


def test_parameters_of_another_dtype_are_used_as_they_are(backend, draw, assert_near):
    x, weight, bias, state = draw(dtype=torch.float32)
    got = causal_conv1d(
        x.bfloat16(), weight, bias, activation="silu", state=state, backend=backend
    )
    wanted, last = reference.conv(
        x.bfloat16().double(), weight.double(), bias.double(), state.bfloat16().double(), True
    )
    assert got.y.dtype == got.state.dtype == torch.bfloat16
    assert_near(got.y, wanted)
    assert torch.equal(got.state, last.bfloat16())


def test_autocast_changes_nothing(backend, draw):
    x, weight, bias, state = draw(dtype=torch.float32)
    plain = causal_conv1d(x, weight, bias, activation="silu", state=state, backend=backend)
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        cast = causal_conv1d(x, weight, bias, activation="silu", state=state, backend=backend)
    assert cast.y.dtype == torch.float32
    assert torch.equal(cast.y, plain.y)


@pytest.mark.parametrize(
    "view",
    [
        lambda t: torch.cat([t, t], dim=2)[..., : t.shape[2]],
        lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
        lambda t: t.mT.contiguous().mT,
        lambda t: torch.stack([t, t], dim=3)[..., 0],
        lambda t: torch.cat([t, t], dim=1)[:, ::2][:, : t.shape[1]],
    ],
    ids=["slice", "time first", "channels first", "every other", "every other step"],
)
def test_strides_do_not_matter(backend, draw, assert_near, view):
    x, weight, bias, state = draw(l=20, d=18)
    x, state = view(x), view(state)
    weight, bias = view(weight[None])[0], view(bias[None, None])[0, 0]
    dy = view(torch.randn(2, 20, 18, dtype=torch.float64))

    def run(*tensors):
        live = [t.detach().requires_grad_() for t in tensors]
        y, last = causal_conv1d(*live[:3], activation="silu", state=live[3], backend=backend)
        return y, last, *torch.autograd.grad((y, last), live, (dy, torch.ones_like(last)))

    strided = run(x, weight, bias, state)
    dense = run(*(t.contiguous() for t in (x, weight, bias, state)))
    for got, wanted in zip(strided, dense, strict=True):
        assert_near(got, wanted)


def test_expanded_inputs_are_read_in_place(backend, draw, assert_near):
    x, weight, bias, _ = draw(b=1, l=1, d=5)
    y = causal_conv1d(x.expand(3, 8, 5), weight, bias, backend=backend).y
    wanted = causal_conv1d(x.repeat(3, 8, 1), weight, bias, backend=backend).y
    assert_near(y, wanted)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_gradients_are_the_same_bits_again(backend, threads):
    """On the same number of threads for every backend; for the kernel, on any number."""
    if backend != "fused" and threads != 2:
        pytest.skip("PyTorch's own sums may depend on the number of threads")
    x = torch.randn(2, 400, 600, requires_grad=True)
    weight = torch.randn(600, 4, requires_grad=True)
    bias = torch.randn(600, requires_grad=True)
    dy = torch.randn(2, 400, 600)

    def gradients(threads):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            y = causal_conv1d(x, weight, bias, activation="silu", backend=backend).y
            return torch.autograd.grad(y, (x, weight, bias), dy)
        finally:
            torch.set_num_threads(before)

    assert all(map(torch.equal, gradients(threads), gradients(2)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 9)}, "x must have shape (b, l, d), got (2, 9)"),
        ({"weight": torch.zeros(4, 4)}, "weight must have shape (d=3, w), got (4, 4)"),
        ({"bias": torch.zeros(4)}, "bias must have shape (d=3), got (4,)"),
        (
            {"state": torch.zeros(2, 3, 4)},
            "state must have shape (b=2, d=3, w-1=3), got (2, 3, 4)",
        ),
        ({"weight": torch.zeros(3, 0)}, "weight must have at least one tap, got 0"),
        (
            {"x": torch.zeros(2, 9, 0), "weight": torch.zeros(0, 4), "bias": None},
            "x must have at least one channel, got 0",
        ),
        (
            {"x": torch.zeros(2, 9, 3, dtype=torch.int64)},
            "x must be float32, bfloat16, float16 or float64, got int64",
        ),
        (
            {"weight": torch.zeros(3, 4, dtype=torch.complex64)},
            "weight must be float32, bfloat16, float16 or float64, got complex64",
        ),
        (
            {"bias": torch.zeros(3, device="meta")},
            "bias must be on cpu like the others, got meta",
        ),
        ({"x": None}, "x must be a tensor, got None"),
        ({"weight": None}, "weight must be a tensor, got None"),
        ({"activation": "relu"}, "activation must be 'silu' or None, got 'relu'"),
        ({"backend": "fast"}, "backend must be one of"),
    ],
)
@pytest.mark.parametrize("operation", [causal_conv1d, causal_conv1d_step])
@pytest.mark.refuses
def test_bad_arguments_are_named(operation, change, message):
    arguments = {
        "x": torch.zeros(2, 9, 3),
        "weight": torch.zeros(3, 4),
        "bias": torch.zeros(3),
        **change,
    }
    if operation is causal_conv1d_step and arguments["x"] is not None:
        arguments["x"] = arguments["x"][:, 0]
        message = message.replace("(b, l, d), got (2, 9)", "(b, d), got (2,)")
    with pytest.raises(ValueError, match=re.escape(f"{operation.__name__}: {message}")):
        operation(**arguments)
