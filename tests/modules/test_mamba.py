"""Laws of the mixer: what it computes, how it begins, what it remembers."""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.testing import assert_close

from mambakit.modules import Mamba, MixerState
from mambakit.ops import causal_conv1d


def make(m=6, *, dtype=torch.float64, seed=0, **sizes):
    torch.manual_seed(seed)
    return Mamba(m, **{"d_state": 3, "d_conv": 3} | sizes, dtype=dtype)


def draw(b=2, l=9, m=6, dtype=torch.float64, seed=1):
    source = torch.Generator().manual_seed(seed)
    u = torch.randn(b, l, m, dtype=dtype, generator=source, device="cpu")
    return u.to(torch.get_default_device())


def by_hand(mixer, u):
    """The block's equations, one step and one channel at a time."""
    b, l, _ = u.shape
    d, n, w = mixer.D.numel(), mixer.d_state, mixer.conv1d.weight.shape[-1]
    out = torch.zeros_like(u)
    for row in range(b):
        x, z = (u[row] @ mixer.in_proj.weight.T).split(d, dim=-1)
        convolved = torch.zeros(l, d, dtype=u.dtype)
        for t in range(l):
            convolved[t] = mixer.conv1d.bias
            for k in range(w):
                if t - w + 1 + k >= 0:
                    convolved[t] += mixer.conv1d.weight[:, 0, k] * x[t - w + 1 + k]
        x = convolved * torch.sigmoid(convolved)
        projected = x @ mixer.x_proj.weight.T
        r = mixer.dt_rank
        dt_low, B, C = projected[:, :r], projected[:, r : r + n], projected[:, r + n :]
        dt = torch.log1p(torch.exp(dt_low @ mixer.dt_proj.weight.T + mixer.dt_proj.bias))
        h = torch.zeros(d, n, dtype=u.dtype)
        for t in range(l):
            for c in range(d):
                h[c] = torch.exp(-dt[t, c] * mixer.A_log[c].exp()) * h[c]
                h[c] = h[c] + dt[t, c] * B[t] * x[t, c]
            y = h @ C[t] + mixer.D * x[t]
            out[row, t] = (y * z[t] * torch.sigmoid(z[t])) @ mixer.out_proj.weight.T
    return out


def test_it_is_the_published_equations():
    mixer, u = make(), draw()
    with torch.no_grad():
        assert_close(mixer(u)[0], by_hand(mixer, u))


@settings(deadline=None, max_examples=15)
@given(l=st.integers(0, 12), data=st.data())
def test_cutting_the_sequence_changes_neither_values_nor_gradients(l, data):
    cut = data.draw(st.integers(0, l))
    mixer, u = make(), draw(l=l).requires_grad_()
    weight = draw(l=l, seed=2)

    def run(pieces):
        state, ys = None, []
        for piece in pieces:
            y, state = mixer(piece, state)
            ys.append(y)
        loss = (torch.cat(ys, dim=1) * weight).sum() + state.ssm.sum() + state.conv.sum()
        return ys, state, torch.autograd.grad(loss, [u, *mixer.parameters()], allow_unused=True)

    ys, end, gradients = run([u[:, :cut], u[:, cut:]])
    (whole,), whole_end, whole_gradients = run([u])
    assert_close(torch.cat(ys, dim=1), whole)
    assert_close(tuple(end), tuple(whole_end))
    for gradient, expected in zip(gradients, whole_gradients, strict=True):
        if expected is not None and gradient is not None:
            assert_close(gradient, expected)
        else:
            assert gradient is expected


def test_gradients_reach_the_state_that_was_given():
    mixer, u = make(), draw(l=2)
    before = MixerState(
        torch.randn(2, 12, 2, dtype=torch.float64, requires_grad=True),
        torch.randn(2, 12, 3, dtype=torch.float64, requires_grad=True),
    )
    y, after = mixer(u, before)
    (y.sum() + after.ssm.sum()).backward()
    assert all(tensor.grad.abs().sum() > 0 for tensor in before)


def test_the_future_does_not_touch_the_past():
    mixer, u = make(), draw()
    later = u.clone()
    later[:, 5:] += 1
    assert_close(mixer(later)[0][:, :5], mixer(u)[0][:, :5], rtol=0, atol=0)


def test_a_nan_stays_in_its_row_and_after_its_step():
    mixer, u = make(), draw()
    spoilt = u.clone()
    spoilt[1, 5] = torch.nan
    y, clean = mixer(spoilt)[0], mixer(u)[0]
    assert_close(y[0], clean[0], rtol=0, atol=0)
    assert_close(y[1, :5], clean[1, :5], rtol=0, atol=0)
    assert y[1, 5:].isnan().all()


def test_the_given_state_is_not_changed():
    mixer, u = make(), draw()
    with torch.no_grad():
        _, state = mixer(u)
        kept = MixerState(*(tensor.clone() for tensor in state))
        mixer(u, state)
    assert_close(tuple(state), tuple(kept), rtol=0, atol=0)


def test_initialisation_is_as_published():
    mixer = make(64, d_state=16, d_conv=4, dtype=None).requires_grad_(False)
    d, r = 128, 4
    assert mixer.dt_rank == r == math.ceil(64 / 16)
    assert_close(mixer.A_log, torch.arange(1.0, 17).log().expand(d, 16))
    assert_close(mixer.D, torch.ones(d))
    assert mixer.dt_proj.weight.abs().max() <= r**-0.5
    assert mixer.dt_proj.weight.std().item() == pytest.approx(r**-0.5 / 3**0.5, rel=0.1)
    dt = F.softplus(mixer.dt_proj.bias.double())
    assert dt.min() >= 1e-3 * (1 - 1e-3)
    assert dt.max() <= 1e-1 * (1 + 1e-3)
    # Log-uniform: the logarithm is uniform, so its mean is that of its bounds.
    assert dt.log().mean().item() == pytest.approx(math.log(1e-2), abs=0.35)
    assert mixer.conv1d.weight.shape == (d, 1, 4)
    assert mixer.conv1d.weight.abs().max() <= 0.5


def test_the_steps_are_raised_to_their_floor():
    mixer = make(dt_min=1e-6, dt_max=1e-5, dt_init_floor=1e-4)
    assert_close(F.softplus(mixer.dt_proj.bias), torch.full((12,), 1e-4, dtype=torch.float64))


def test_biases_are_there_when_asked_for():
    mixer = make(bias=True, conv_bias=False)
    assert_close(mixer.in_proj.bias, torch.zeros_like(mixer.in_proj.bias))
    assert_close(mixer.out_proj.bias, torch.zeros_like(mixer.out_proj.bias))
    assert mixer.conv1d.bias is None
    assert mixer(draw())[0].shape == (2, 9, 6)


def test_no_decay_marks_are_on_what_is_no_matrix_of_a_projection():
    mixer = make(bias=True)
    marked = {
        name for name, p in mixer.named_parameters() if getattr(p, "_no_weight_decay", False)
    }
    assert marked == {
        "A_log", "D", "in_proj.bias", "conv1d.bias", "dt_proj.bias", "out_proj.bias",
    }  # fmt: skip


WIDE = {"A_log", "D", "dt_proj.bias"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("how", ["made", "converted"])
def test_decay_and_step_stay_float32(dtype, how):
    mixer = make(dtype=dtype) if how == "made" else make(dtype=torch.float32).to(dtype)
    for name, parameter in mixer.named_parameters():
        assert parameter.dtype == (torch.float32 if name in WIDE else dtype), name
    y, state = mixer(draw(dtype=dtype))
    assert (y.dtype, state.conv.dtype, state.ssm.dtype) == (dtype, dtype, torch.float32)


def test_conversion_keeps_values_gradients_and_marks():
    mixer = make(dtype=torch.float32)
    A_log = mixer.A_log.detach().clone()
    mixer(draw(dtype=torch.float32))[0].sum().backward()
    gradient = mixer.A_log.grad.clone()
    mixer.to(torch.bfloat16)
    assert_close(mixer.A_log, A_log, rtol=0, atol=0, check_dtype=True)
    assert_close(mixer.A_log.grad, gradient, rtol=0, atol=0, check_dtype=True)
    assert mixer.A_log._no_weight_decay
    assert mixer.to(torch.float64).A_log.dtype == torch.float64


def test_bfloat16_is_close_to_float32_of_the_same_weights():
    short = make(32, d_state=8, d_conv=4, dtype=torch.float32).to(torch.bfloat16)
    u = draw(l=64, m=32, dtype=torch.bfloat16)
    exact = make(32, d_state=8, d_conv=4, dtype=torch.float32)
    exact.load_state_dict(short.state_dict())
    y, expected = short(u)[0].float(), exact(u.float())[0]
    assert (y - expected).abs().max() <= 0.02 * expected.abs().max()


def test_autocast_keeps_the_state_in_float32():
    mixer = make(dtype=torch.float32)
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        y, state = mixer(draw(dtype=torch.float32))
    assert (y.dtype, state.ssm.dtype) == (torch.bfloat16, torch.float32)


class Adapter(nn.Module):
    """A low-rank change of a linear layer, as adapters make it around the layer."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 2, bias=False, dtype=base.weight.dtype)
        self.up = nn.Linear(2, base.out_features, bias=False, dtype=base.weight.dtype)

    @property
    def bias(self):
        return self.base.bias

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def test_adapters_around_every_projection_are_heard_and_trained():
    adapted, merged, u = make(bias=True), make(bias=True), draw()
    for name in ("in_proj", "x_proj", "dt_proj", "out_proj"):
        adapter = Adapter(getattr(adapted, name))
        setattr(adapted, name, adapter)
        with torch.no_grad():
            getattr(merged, name).weight.add_(adapter.up.weight @ adapter.down.weight)
    y, _ = adapted(u)
    assert_close(y, merged(u)[0])
    y.square().sum().backward()
    for name in ("in_proj", "x_proj", "dt_proj", "out_proj"):
        adapter = getattr(adapted, name)
        assert adapter.up.weight.grad.abs().sum() > 0
        assert adapter.down.weight.grad.abs().sum() > 0


def test_state_has_the_promised_shapes_and_can_be_moved():
    mixer, u = make(dtype=torch.float32), draw(dtype=torch.float32)
    _, state = mixer(u)
    assert state.conv.shape == (2, 12, 2)
    assert state.ssm.shape == (2, 12, 3)
    assert_close(state.rows(slice(1, 2)).ssm, state.ssm[1:])
    short = state.to(dtype=torch.bfloat16)
    assert (short.conv.dtype, short.ssm.dtype) == (torch.bfloat16, torch.float32)
    assert state.ssm.requires_grad
    assert not state.detach().ssm.requires_grad


def test_the_state_of_the_convolution_is_its_last_inputs():
    mixer, u = make(), draw()
    x, _ = mixer.in_proj(u).chunk(2, dim=-1)
    expected = causal_conv1d(x, mixer.conv1d.weight[:, 0], mixer.conv1d.bias).state
    assert_close(mixer(u)[1].conv, expected)
    assert_close(expected, x[:, -2:].mT)


@pytest.mark.refuses
@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"d_model": 0}, "Mamba: d_model must be a whole number of at least 1, got 0"),
        ({"d_state": 257}, "Mamba: d_state must be at most 256, got 257"),
        ({"dt_rank": 0}, "Mamba: dt_rank must be a whole number of at least 1, got 0"),
        ({"d_model": 16.5}, "Mamba: d_model must be a whole number of at least 1, got 16.5"),
        ({"d_conv": True}, "Mamba: d_conv must be a whole number of at least 1, got True"),
        ({"expand": "2"}, "Mamba: expand must be a whole number of at least 1, got '2'"),
        ({"dt_rank": "big"}, "Mamba: dt_rank must be a whole number of at least 1, got 'big'"),
        ({"dt_min": 0.2}, "Mamba: dt_min must be at most dt_max=0.1, got 0.2"),
        ({"dt_min": 0}, "Mamba: dt_min must be a positive, finite number, got 0"),
        ({"dt_max": None}, "Mamba: dt_max must be a positive, finite number, got None"),
        (
            {"dt_init_floor": float("nan")},
            "Mamba: dt_init_floor must be a positive, finite number, got nan",
        ),
    ],
)
def test_bad_sizes_are_named(sizes, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Mamba(**{"d_model": 8} | sizes)


@pytest.mark.refuses
def test_a_state_of_another_size_is_refused():
    u = draw()
    _, state = make(d_state=4)(u)
    with pytest.raises(ValueError, match=r"state must have .*, got \(2, 12, 4\)"):
        make()(u, state)
