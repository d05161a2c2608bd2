"""Laws that every backend of the selective scan obeys, and what it says to bad input."""

import itertools
import math
import re
from functools import partial

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.testing import assert_close

from mambakit.ops import ScanOutput, selective_scan, selective_step
from mambakit.ops.scan.cpu import checkpoint_shape

FORMS = ["constant", "token", "grouped"]
OVER_TIME = ("x", "dt", "B", "C", "gate")
EXACT = {"rtol": 0, "atol": 0}


def over(inputs, span):
    """The inputs of a part of the sequence."""
    return {k: v[:, span] if k in OVER_TIME and v.ndim > 2 else v for k, v in inputs.items()}


def test_constant_input_follows_the_closed_form(backend):
    """With fixed coefficients the state is a geometric series: h_t = u (1 - a^t) / (1 - a)."""
    l, dt, A = 12, 0.3, -0.7
    ones = torch.ones(1, l, 1, dtype=torch.float64)
    y, state = selective_scan(ones, dt * ones, A * ones[0, :1], ones, ones, backend=backend)
    a = torch.exp(torch.tensor(dt * A, dtype=torch.float64))
    t = torch.arange(1, l + 1, dtype=torch.float64)
    assert_close(y[0, :, 0], dt * (1 - a**t) / (1 - a))
    assert_close(state[0, 0], y[0, -1])


def test_fixed_coefficients_are_a_convolution(backend, draw, assert_near):
    """A system that does not change in time has a kernel: K_t = C exp(t dt A) dt B."""
    inputs = draw(l=200, B="constant", C="constant", without=("D", "gate", "dt_bias", "state"))
    step = torch.rand(6, dtype=torch.float64) * 0.1
    inputs |= {"dt": step.expand(2, 200, 6), "dt_softplus": False}
    t = torch.arange(200, dtype=torch.float64)[:, None, None]
    decay = torch.exp(t * step[:, None] * inputs["A"])
    kernel = (inputs["C"] * decay * step[:, None] * inputs["B"]).sum(-1)  # (l, d)
    spectrum = torch.fft.rfft(kernel, 400, dim=0) * torch.fft.rfft(inputs["x"], 400, dim=1)
    wanted = torch.fft.irfft(spectrum, 400, dim=1)[:, :200]
    assert_near(selective_scan(**inputs, backend=backend).y, wanted)


def test_softplus_bias_skip_and_gate_are_what_they_say(backend, draw, assert_near):
    inputs = draw()
    got = selective_scan(**inputs, backend=backend)
    x, gate = inputs["x"], inputs["gate"]
    dt = torch.log1p(torch.exp(inputs["dt"] + inputs["dt_bias"]))
    plain = selective_scan(
        x, dt, inputs["A"], inputs["B"], inputs["C"], state=inputs["state"], backend=backend
    )
    assert_near(got.y, (plain.y + inputs["D"] * x) * gate / (1 + torch.exp(-gate)))
    assert_near(got.state, plain.state)


@settings(deadline=None, max_examples=20)
@given(l=st.integers(0, 300), seed=st.integers(0, 99), data=st.data())
def test_cutting_the_sequence_anywhere_changes_nothing(
    backend, draw, assert_near, l, seed, data
):
    cut = data.draw(st.integers(0, l))
    B, C = (data.draw(st.sampled_from(FORMS)) for _ in range(2))
    inputs = draw(l=l, B=B, C=C, seed=seed)
    whole = selective_scan(**inputs, backend=backend)
    left = selective_scan(**over(inputs, slice(None, cut)), backend=backend)
    rest = over(inputs, slice(cut, None)) | {"state": left.state}
    right = selective_scan(**rest, backend=backend)
    assert_near(torch.cat([left.y, right.y], dim=1), whole.y)
    assert_near(right.state, whole.state)


def test_gradients_cross_a_cut(backend, draw, assert_near):
    """The gradient of a sequence that was scanned in two parts is that of the whole."""
    inputs = draw(l=140)
    leaves = {k: v.requires_grad_() for k, v in inputs.items() if torch.is_tensor(v)}
    whole = selective_scan(**inputs, backend=backend).y.sum()
    left = selective_scan(**over(inputs, slice(None, 70)), backend=backend)
    rest = over(inputs, slice(70, None)) | {"state": left.state}
    parts = left.y.sum() + selective_scan(**rest, backend=backend).y.sum()
    wanted = torch.autograd.grad(whole, list(leaves.values()))
    for name, a, b in zip(
        leaves, torch.autograd.grad(parts, list(leaves.values())), wanted, strict=True
    ):
        assert_near(a, b, f"gradient of {name}")


def test_the_future_does_not_touch_the_past(backend, draw):
    inputs = draw(l=150)
    later = inputs | {k: inputs[k].clone() for k in OVER_TIME}
    for k in OVER_TIME:
        later[k][:, 70:] += 1
    past = selective_scan(**inputs, backend=backend).y[:, :70]
    assert_close(selective_scan(**later, backend=backend).y[:, :70], past, **EXACT)


@pytest.mark.parametrize("B", FORMS)
@pytest.mark.parametrize("C", FORMS)
def test_gradients_match_finite_differences(backend, draw, B, C):
    inputs = draw(b=1, l=4, d=4, n=2, B=B, C=C)
    names = [k for k, v in inputs.items() if torch.is_tensor(v)]

    def scan(*values):
        return selective_scan(
            **dict(zip(names, values, strict=True)), dt_softplus=True, backend=backend
        )

    assert torch.autograd.gradcheck(scan, [inputs[k].requires_grad_() for k in names])


@pytest.mark.parametrize("name", ["D", "gate", "dt_bias", "state"])
def test_gradients_match_finite_differences_without(backend, draw, name):
    inputs = draw(b=2, l=3, d=2, n=2, without=(name,))
    names = [k for k, v in inputs.items() if torch.is_tensor(v)]

    def scan(*values):
        given = dict(zip(names, values, strict=True))
        given["dt"] = given["dt"] ** 2
        return selective_scan(**given, dt_softplus=False, backend=backend)

    assert torch.autograd.gradcheck(scan, [inputs[k].requires_grad_() for k in names])


@pytest.mark.parametrize("l", [0, 1, 63, 64, 65, 129, 400])
@pytest.mark.parametrize("B", FORMS)
def test_every_length_agrees_with_the_reference(
    fast_backend, draw, gradients, assert_near, l, B
):
    inputs = draw(l=l, B=B, C=FORMS[l % 3])
    wanted, got = gradients(inputs, "reference"), gradients(inputs, fast_backend)
    for name, value in wanted.items():
        assert_near(got[name], value, f"{name} at l={l}")


@pytest.mark.parametrize("B", FORMS)
@pytest.mark.parametrize("C", FORMS)
def test_the_gradients_of_no_steps_are_zeros(backend, draw, B, C):
    inputs = draw(l=0, B=B, C=C)
    inputs["dt_bias"][0] = inputs["A"][0] = torch.nan  # zeros, and not zero times this
    leaves = {k: v.requires_grad_() for k, v in inputs.items() if torch.is_tensor(v)}
    y, state = selective_scan(**inputs, backend=backend)
    assert y.shape == (2, 0, 6)
    assert_close(state, inputs["state"], **EXACT)
    (y.sum() + state.sum()).backward()
    for name, leaf in leaves.items():
        wanted = torch.ones_like(leaf) if name == "state" else torch.zeros_like(leaf)
        assert_close(leaf.grad, wanted, **EXACT)


@pytest.mark.parametrize(("d", "g"), [(1, 1), (3, 3), (17, 1), (34, 2), (48, 3)])
@pytest.mark.parametrize("n", [1, 3, 5, 16, 64, 256])
def test_every_width_agrees_with_the_reference(
    fast_backend, draw, gradients, assert_near, d, g, n
):
    inputs = draw(b=3, l=20, d=d, n=n, B="grouped", C="token", g=g)
    wanted, got = gradients(inputs, "reference"), gradients(inputs, fast_backend)
    for name, value in wanted.items():
        assert_near(got[name], value, f"{name} at d={d}, n={n}, g={g}")


def test_only_the_gradients_that_are_asked_for(fast_backend, draw, assert_near):
    inputs = draw(l=70)
    both = {}
    for backend in ("reference", fast_backend):
        x = inputs["x"].clone().requires_grad_()
        y, state = selective_scan(**inputs | {"x": x}, backend=backend)
        both[backend] = torch.autograd.grad(state.square().sum(), x)[0]
        assert y.requires_grad
    assert_near(both[fast_backend], both["reference"])


def test_groups_are_repeated_coefficients(backend, draw, gradients, assert_near):
    inputs = draw(d=6, B="grouped", C="grouped", g=2)
    repeated = inputs | {k: inputs[k].repeat_interleave(3, dim=2) for k in ("B", "C")}
    one, other = gradients(inputs, backend), gradients(repeated, backend)
    for name in one.keys() - {"dB", "dC"}:
        assert_near(one[name], other[name], name)
    for name in ("dB", "dC"):
        assert_near(one[name], other[name].unflatten(2, (2, 3)).sum(3), name)


def test_one_group_is_no_group(backend, draw):
    inputs = draw(B="token", C="token")
    grouped = inputs | {k: inputs[k][:, :, None] for k in ("B", "C")}
    one, other = (selective_scan(**i, backend=backend) for i in (inputs, grouped))
    assert_close(one.y, other.y, **EXACT)
    assert_close(one.state, other.state, **EXACT)


@pytest.mark.parametrize("B", FORMS)
@pytest.mark.parametrize("C", FORMS)
def test_a_step_is_a_scan_of_length_one(backend, draw, assert_near, B, C):
    inputs = draw(l=1, B=B, C=C)
    whole = selective_scan(**inputs, backend=backend)
    at = {k: v[:, 0] if k in OVER_TIME and v.ndim > 2 else v for k, v in inputs.items()}
    b, _, d = inputs["x"].shape
    if "constant" in (B, C):  # a group for each channel, of the other coefficient too
        for name in ("B", "C"):
            if inputs[name].ndim == 2:
                at[name] = inputs[name].expand(b, -1, -1)
            elif at[name].ndim == 3:
                at[name] = at[name].repeat_interleave(d // at[name].shape[1], dim=1)
    y, state = selective_step(**at, backend=backend)
    # to the bit where nothing is summed in an order of the device's choice
    same = assert_near if backend == "parallel" else partial(assert_close, **EXACT)
    same(y, whole.y[:, 0])
    same(state, whole.state)


def test_stepping_is_scanning(backend, draw, assert_near):
    inputs = draw(l=20)
    whole = selective_scan(**inputs, backend=backend)
    state = inputs["state"]
    for t in range(20):
        at = {k: v[:, t] if k in OVER_TIME else v for k, v in inputs.items()}
        y, state = selective_step(**at | {"state": state}, backend=backend)
        assert_near(y, whole.y[:, t])
    assert_near(state, whole.state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_at_most_twice_that_of_the_reference(fast_backend, draw, gradients, dtype):
    """In one precision, against the truth in float64, for outputs and every gradient.

    The root mean square over three draws: the largest error of a few sums is a matter of luck.
    """
    squares = {}
    for seed in range(3):
        rough = draw(b=2, l=200, d=20, n=16, dtype=dtype, seed=seed)
        exact = {k: v.double() if torch.is_tensor(v) else v for k, v in rough.items()}
        truth = gradients(exact, "reference")
        eager, fast = gradients(rough, "reference"), gradients(rough, fast_backend)
        for name, true in truth.items():
            assert fast[name].dtype == eager[name].dtype
            sums = squares.setdefault(name, [0.0, 0.0])
            for k, found in enumerate((fast, eager)):
                sums[k] += (found[name].double() - true).square().sum().item()
    for name, (fast_square, eager_square) in squares.items():
        ratio = (fast_square / eager_square) ** 0.5
        assert ratio <= 2, f"the error of {name} is {ratio:.2f} times the reference's"


@pytest.mark.parametrize("double", [None, "dt", "B", "C", "gate"])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_may_be_mixed(backend, draw, gradients, assert_near, x_dtype, double):
    exact = draw(l=30, dtype=torch.float32)
    narrow = {"x": x_dtype, "dt": torch.float32, "B": torch.bfloat16, "C": torch.float16}
    if double is not None:
        narrow[double] = torch.float64
    inputs = exact | {k: exact[k].to(v) for k, v in narrow.items()}
    inputs |= {"A": inputs["A"].double(), "dt_bias": inputs["dt_bias"].bfloat16()}
    got, same = gradients(inputs, backend), gradients(inputs, "reference")
    wanted = gradients(
        {k: v.float() if torch.is_tensor(v) else v for k, v in inputs.items()}, "reference"
    )
    assert got["y"].dtype == x_dtype
    assert got["last"].dtype == torch.float32
    for name in ("y", "last"):
        assert_near(got[name], wanted[name], name)
    for name, value in inputs.items():
        if torch.is_tensor(value):
            found, true = got[f"d{name}"], same[f"d{name}"]
            assert found.dtype == value.dtype
            if found.dtype == torch.float64:  # that it is stored in; it was summed in float32
                found, true = found.float(), true.float()
            scale = true.abs().max()
            assert_near(found / scale, true / scale, f"gradient of {name}")


def test_float64_input_makes_everything_float64(backend, draw, gradients, assert_near):
    for B, C in (("token", "constant"), ("grouped", "token")):
        inputs = draw(l=70, B=B, C=C, dtype=torch.float32)
        inputs |= {"B": inputs["B"].bfloat16(), "x": inputs["x"].double()}
        wanted = gradients(
            {k: v.double() if torch.is_tensor(v) else v for k, v in inputs.items()},
            "reference",
        )
        got = gradients(inputs, backend)
        assert got["y"].dtype == got["last"].dtype == torch.float64
        for name, true in wanted.items():
            scale = true.abs().max()
            assert_near(got[name] / scale, true / scale, name)
        for name, value in inputs.items():
            if torch.is_tensor(value):
                assert got[f"d{name}"].dtype == value.dtype


def test_autocast_changes_nothing(backend, draw, gradients):
    inputs = draw(dtype=torch.float32)
    wanted = gradients(inputs, backend)
    with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
        got = gradients(inputs, backend)
    for name, value in wanted.items():
        assert got[name].dtype == torch.float32
        assert_close(got[name], value, **EXACT)


def test_backward_is_deterministic(backend, draw, gradients):
    inputs = draw(b=2, l=300, d=40, n=16, B="constant", dtype=torch.float32)
    first, second = (gradients(inputs, backend) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize(
    "layout", ["slice", "odd slice", "transposed", "expanded", "time first"]
)
def test_any_strides_are_accepted(backend, draw, gradients, assert_near, layout):
    b, l, d, n = 2, 70, 6, 4
    dense = draw(b, l, d, n, dtype=torch.float32)

    def lay(t):
        if layout == "slice":
            return torch.cat([t, t], dim=-1)[..., : t.shape[-1]]
        if layout == "odd slice":
            return torch.stack([t, t], dim=-1)[..., 0]
        if layout == "transposed":
            return t.mT.contiguous().mT
        if layout == "time first":
            return t.transpose(0, 1).contiguous().transpose(0, 1)
        return t[:1, :1].expand(t.shape)

    inputs = dense | {k: lay(dense[k]) for k in (*OVER_TIME, "A", "state") if dense[k].ndim > 2}
    wanted = gradients(
        {k: v.contiguous() if torch.is_tensor(v) else v for k, v in inputs.items()}, backend
    )
    got = gradients(inputs, backend)
    for name, value in wanted.items():
        assert_near(got[name], value, name)


@pytest.mark.cpu  # whose memory is measured
def test_slices_are_not_copied(draw):
    """The fast case of the promise: parts of a wider tensor are read where they lie."""
    _needs_fused()
    b, l, d, n = 1, 512, 64, 16
    inputs = draw(b, l, d, n, dtype=torch.float32)
    inputs["x"], inputs["gate"] = torch.randn(b, l, 2 * d).chunk(2, dim=-1)
    inputs["B"], inputs["C"] = torch.randn(b, l, 8 + 2 * n)[..., 8:].chunk(2, dim=-1)
    leaves = [v.requires_grad_() for v in inputs.values() if torch.is_tensor(v)]
    dy, dlast = torch.randn(b, l, 2 * d)[..., :d], torch.randn(b, d, n)

    with _Memory() as forward:
        out = selective_scan(**inputs, backend="fused")
    y, state, checkpoints = b * l * d, b * d * n, math.prod(checkpoint_shape(b, l, d, n))
    assert forward.made() == sorted([y, state, checkpoints])
    with _Memory() as backward:
        torch.autograd.grad(out, leaves, (dy, dlast))
    # x, dt and gate; B and C; A and state; D and dt_bias
    assert backward.made() == sorted([y] * 3 + [b * l * n] * 2 + [d * n] * 2 + [d] * 2)

    inputs["x"] = torch.randn(b, d, l).mT  # the measure does see a copy that is made
    with _Memory() as strided, torch.no_grad():
        selective_scan(**inputs, backend="fused")
    assert strided.made() == sorted([y, y, state])


def test_nothing_that_was_given_is_changed_or_shared(backend, draw):
    for l in (0, 9):
        inputs = draw(l=l, dtype=torch.float32)
        copies = {k: v.clone() for k, v in inputs.items() if torch.is_tensor(v)}
        y, state = selective_scan(**inputs, backend=backend)
        y.fill_(7)
        state.fill_(7)
        for name, value in copies.items():
            assert_close(inputs[name], value, **EXACT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_an_empty_sequence_hands_the_state_on(backend, draw, dtype):
    inputs = draw(l=0, dtype=dtype)
    y, state = selective_scan(**inputs, backend=backend)
    assert y.shape == (2, 0, 6)
    assert y.dtype == dtype
    assert state.dtype == torch.promote_types(dtype, torch.float32)
    assert_close(state, inputs["state"].to(state.dtype), **EXACT)
    assert not selective_scan(**inputs | {"state": None}, backend=backend).state.any()


def test_an_empty_batch_has_gradients_of_zero(backend, draw, gradients):
    found = gradients(draw(b=0), backend)
    assert found["y"].shape == (0, 9, 6)
    assert found["last"].shape == (0, 6, 4)
    assert not found["dA"].any()
    assert not found["dD"].any()


@pytest.mark.parametrize("name", OVER_TIME)
def test_a_nan_reaches_the_steps_after_it_in_its_row_and_nothing_else(backend, draw, name):
    inputs = draw(b=3, l=150, d=5, g=1, dtype=torch.float32)
    clean = selective_scan(**inputs, backend=backend)
    inputs[name] = inputs[name].clone()
    inputs[name][1, 70, 2] = float("nan")
    y, state = selective_scan(**inputs, backend=backend)
    assert_close(y[::2], clean.y[::2], **EXACT)
    assert_close(state[::2], clean.state[::2], **EXACT)
    assert_close(y[1, :70], clean.y[1, :70], **EXACT)
    hit = y[1].isnan()
    if name in ("C", "gate"):  # these never enter the state
        assert hit.any(dim=1).nonzero().tolist() == [[70]]
        assert not state.isnan().any()
    elif name == "B":
        assert hit[70:].all()
    else:
        assert hit[70:, 2].all()
        assert hit.sum() == 80
        assert state.isnan().nonzero()[:, :2].unique(dim=0).tolist() == [[1, 2]]


def test_huge_steps_forget_and_zero_steps_keep(backend, draw):
    inputs = draw(l=3, without=("gate", "dt_bias", "D"), dtype=torch.float32)
    inputs |= {"dt_softplus": False, "x": torch.zeros(2, 3, 6)}
    keep = selective_scan(**inputs | {"dt": torch.zeros(2, 3, 6)}, backend=backend)
    assert_close(keep.state, inputs["state"], **EXACT)
    forget = selective_scan(**inputs | {"dt": torch.full((2, 3, 6), 1e30)}, backend=backend)
    assert not forget.state.any()


class _Memory:
    """Note every allocation of PyTorch, in elements of float32, also inside operators."""

    def __enter__(self):
        self._profile = torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        )
        self._profile.__enter__()
        return self

    def __exit__(self, *raised):
        self._profile.__exit__(*raised)
        events = self._profile.profiler.kineto_results.events()
        self._changes = [e.nbytes() / 4 for e in events if e.name() == "[memory]"]

    def made(self):
        return sorted(change for change in self._changes if change > 0)

    def peak(self):
        return max(itertools.accumulate(self._changes))


def _needs_fused():
    from mambakit.ops._backends import why_not_fused

    why = why_not_fused("selective_scan", torch.device("cpu"))
    if why is not None:
        pytest.skip(why)


@pytest.mark.cpu  # whose memory is measured
@pytest.mark.parametrize(("n", "sequences"), [(16, None), (64, None), (16, 8)])
def test_memory_grows_with_the_length_and_not_with_the_states(fast_backend, draw, n, sequences):
    """What the backward pass keeps, and all that lives at once on the way, is O(b l d)."""
    b, d = 1, 48
    how = {"backend": fast_backend}

    def run(l):
        inputs = draw(b, l, d, n, dtype=torch.float32)
        if sequences is not None:
            inputs["state"] = draw(sequences, 1, d, n, dtype=torch.float32)["state"]
            how["cu_seqlens"] = torch.arange(sequences + 1) * (l // sequences)
        saved = []
        leaves = {k: v.requires_grad_() for k, v in inputs.items() if torch.is_tensor(v)}
        with (
            _Memory() as memory,
            torch.autograd.graph.saved_tensors_hooks(
                lambda t: saved.append(t.numel()) or t, lambda t: t
            ),
        ):
            y, _ = selective_scan(**inputs, **how)
            torch.autograd.grad(y.sum(), list(leaves.values()))
        return max(memory.made()), memory.peak(), sum(saved)

    l, states = 8192, (sequences or b) * d * n
    x, checkpoints = b * l * d, math.prod(checkpoint_shape(b, l, d, n, sequences))
    largest, peak, kept = run(l)
    assert largest <= (max(2 * x, checkpoints) if fast_backend == "fused" else 2 * x)
    assert kept <= 3 * x + 2 * b * l * n + checkpoints + 10 * states
    if fast_backend == "fused":  # y, dy, dx, ddt, dgate; dB, dC; and nothing on the way
        assert peak <= 5 * x + 2 * b * l * n + checkpoints + 10 * states
    else:
        assert peak <= 30 * x  # and the states alone would be n of them
    _, twice_peak, twice_kept = run(2 * l)
    assert twice_peak <= 2.1 * peak
    assert twice_kept <= 2.1 * kept


def test_derivatives_by_torch_func_need_the_reference(fast_backend, draw):
    inputs = draw(l=5)

    def loss(x, backend):
        return selective_scan(**inputs | {"x": x}, backend=backend).y.sum()

    for transform in (torch.func.grad, torch.func.jacrev):
        with pytest.raises(
            RuntimeError,
            match=r"^selective_scan: derivatives by torch\.func exist only with backend='ref",
        ):
            transform(loss)(inputs["x"], fast_backend)
        transform(loss)(inputs["x"], "reference")


def test_forward_mode_needs_the_reference(fast_backend, draw, assert_near):
    """A kernel knows no tangents and says so; it never returns one of zero."""
    inputs = draw(l=5)
    names = [k for k, v in inputs.items() if torch.is_tensor(v)]
    values = [inputs[k] for k in names]
    along = [torch.randn_like(v) for v in values]

    def scan(backend):
        def run(*values):
            given = inputs | dict(zip(names, values, strict=True))
            return tuple(selective_scan(**given, backend=backend))

        return run

    (y, last), (dy, dlast) = torch.func.jvp(scan("reference"), tuple(values), tuple(along))
    leaves = [v.requires_grad_() for v in values]
    back = torch.autograd.grad(scan("reference")(*leaves), leaves, (y, last))
    forth = sum((g * v).sum() for g, v in zip(back, along, strict=True))
    assert_near((dy * y).sum() + (dlast * last).sum(), forth)

    sentence = "^selective_scan: forward-mode derivatives exist only with backend='reference'$"
    for i, name in enumerate(names):
        plain = {k: v.detach() if torch.is_tensor(v) else v for k, v in inputs.items()}
        with torch.autograd.forward_ad.dual_level():
            for mode in (torch.enable_grad, torch.no_grad):
                dual = torch.autograd.forward_ad.make_dual(plain[name], along[i])
                with mode(), pytest.raises(RuntimeError, match=sentence):
                    selective_scan(**plain | {name: dual}, backend=fast_backend)
            untouched = selective_scan(**plain, backend=fast_backend)
        assert_near(untouched.y, y)
    with pytest.raises(RuntimeError, match=sentence):
        torch.func.jvp(scan(fast_backend), tuple(values), tuple(along))


def test_forward_mode_over_reverse_needs_the_reference(fast_backend, draw):
    inputs = draw(l=5)
    x = inputs["x"].requires_grad_()
    y = selective_scan(**inputs, backend=fast_backend).y
    with torch.autograd.forward_ad.dual_level():
        dy = torch.autograd.forward_ad.make_dual(torch.ones_like(y), torch.ones_like(y))
        with pytest.raises(RuntimeError, match="forward-mode derivatives exist only with back"):
            torch.autograd.grad(y, x, dy)


def test_second_derivatives_need_the_reference(draw):
    inputs = draw(b=1, l=3, d=2, n=2)
    x = inputs["x"].requires_grad_()

    def scan(x, backend):
        return selective_scan(**inputs | {"x": x}, backend=backend).y.square()

    assert torch.autograd.gradgradcheck(lambda x: scan(x, "reference"), [x])
    first = torch.autograd.grad(scan(x, "parallel").sum(), x, create_graph=False)
    assert first[0].shape == x.shape
    with pytest.raises(RuntimeError, match="second derivatives exist only with backend='refer"):
        torch.autograd.grad(scan(x, "parallel").sum(), x, create_graph=True)


def test_the_output_is_a_named_pair(draw):
    out = selective_scan(**draw())
    assert isinstance(out, ScanOutput)
    assert out.y is out[0]
    assert out.state is out[1]


def bad(name, value, message):
    return pytest.param(name, value, message, id=f"{name} {message[:40]}")


T = torch.ones
BAD_SCANS = [
    bad("x", T(2, 9), "x must have shape (b, l, d), got (2, 9)"),
    bad("x", T(2, 9, 6, 1), "x must have shape (b, l, d), got (2, 9, 6, 1)"),
    bad("x", [1.0], "x must be a tensor, got list"),
    bad("x", T(2, 9, 6, dtype=torch.int64),
        "x must be float32, bfloat16, float16 or float64, got int64"),
    bad("dt", T(2, 8, 6), "dt must have shape (b=2, l=9, d=6), got (2, 8, 6)"),
    bad("dt", 0.1, "dt must be a tensor, got float"),
    bad("A", T(4, 6), "A must have shape (d=6, n), got (4, 6)"),
    bad("A", T(6, 4, dtype=torch.complex64),
        "A must be float32, bfloat16, float16 or float64, got complex64"),
    bad("A", T(6, 257), "A must have between 1 and 256 states (its last axis), got 257"),
    bad("A", T(6, 0), "A must have between 1 and 256 states (its last axis), got 0"),
    bad("B", T(2, 4, 9), "B must have shape (b=2, l=9, n=4), got (2, 4, 9)"),
    bad("B", T(2), "B must have shape (d, n), (b, l, n) or (b, l, g, n), got (2,)"),
    bad("B", T(2, 9, 4, 4), "B and C must have a number of groups that divides d=6, got 4"),
    bad("B", T(2, 9, 0, 4), "B and C must have a number of groups that divides d=6, got 0"),
    bad("C", T(2, 9, 4, device="meta"), "C must be on cpu like the others, got meta"),
    bad("C", T(2, 9, 4).to_sparse(), "C must be a dense tensor, got layout sparse_coo"),
    bad("D", T(5), "D must have shape (d=6), got (5,)"),
    bad("gate", T(2, 9, 1), "gate must have shape (b=2, l=9, d=6), got (2, 9, 1)"),
    bad("dt_bias", T(1), "dt_bias must have shape (d=6), got (1,)"),
    bad("state", T(2, 4, 6), "state must have shape (b=2, d=6, n=4), got (2, 4, 6)"),
    bad("dt_softplus", T(1), "dt_softplus must be True or False, got a Tensor"),
    bad("backend", "quick",
        "backend must be one of ('auto', 'reference', 'parallel', 'fused'), got 'quick'"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value", "message"), BAD_SCANS)
@pytest.mark.refuses
def test_bad_input_gets_one_clear_sentence(draw, name, value, message):
    inputs = draw(dtype=torch.float32) | {name: value}
    if name == "A" and torch.is_tensor(value) and value.shape[1] in (0, 257):
        n = value.shape[1]
        inputs |= {"B": T(2, 9, n), "C": T(2, 9, n), "state": None}
    with pytest.raises(ValueError, match=f"^selective_scan: {re.escape(message)}$"):
        selective_scan(**inputs)


@pytest.mark.refuses
@pytest.mark.parametrize("name", ["x", "dt", "A", "B", "C"])
@pytest.mark.parametrize("operation", [selective_scan, selective_step])
def test_what_every_scan_needs_may_not_be_none(draw, operation, name):
    sentence = f"^{operation.__name__}: {name} must be a tensor, got None$"
    with pytest.raises(ValueError, match=sentence):
        operation(**draw() | {name: None})


def test_no_channels_are_refused(draw):
    inputs = draw(d=6, dtype=torch.float32, without=("D", "gate", "dt_bias", "state"))
    empty = inputs | {"x": T(2, 9, 0), "dt": T(2, 9, 0), "A": T(0, 4)}
    with pytest.raises(ValueError, match=r"^selective_scan: x must have at least one channel"):
        selective_scan(**empty)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        bad("x", T(2, 1, 6), "x must have shape (b, d), got (2, 1, 6)"),
        bad("B", T(6, 4), "B must have shape (b=2, n=4), got (6, 4)"),
        bad("B", T(2, 3, 1, 4), "B must have shape (b, n) or (b, g, n), got (2, 3, 1, 4)"),
        bad("C", T(2, 5, 4), "B and C must have a number of groups that divides d=6, got 5"),
        bad("C", T(2, 4).int(), "C must be float32, bfloat16, float16 or float64, got int32"),
        bad("state", T(2, 6), "state must have shape (b=2, d=6, n=4), got (2, 6)"),
    ],
)
@pytest.mark.refuses
def test_bad_steps_get_one_clear_sentence(draw, name, value, message):
    inputs = draw(dtype=torch.float32)
    at = {k: v[:, 0] if k in OVER_TIME else v for k, v in inputs.items()} | {name: value}
    with pytest.raises(ValueError, match=f"^selective_step: {re.escape(message)}$"):
        selective_step(**at)
