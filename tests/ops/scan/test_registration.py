"""The scans as registered operators: sound, and one graph for every length under compilers."""

import pytest
import torch
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.testing import assert_close

from mambakit.ops import selective_scan, selective_step
from mambakit.ops.scan import fused as scan_kernels, registration
from mambakit.ops.scan.registration import Kernels
from tests.ops import packs

pytestmark = pytest.mark.compiles

OPERATORS = {"parallel": "parallel_scan", "fused": "selective_scan"}
NAMES = ("x", "dt", "A", "B", "C", "D", "gate", "dt_bias", "state")
OVER_TIME = ("x", "dt", "B", "C", "gate")


def arguments(inputs, operator, *, save):
    """What an operator takes; the steps are for the devices that save a state at all."""
    steps = (
        scan_kernels.checkpoint_steps(inputs["x"].device) if operator == "selective_scan" else 0
    )
    names = (*NAMES, "cu_seqlens")
    return (*(inputs.get(name) for name in names), inputs["dt_softplus"], steps, save)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize(
    ("l", "dtype", "B", "without"),
    [
        (70, torch.float32, "token", ()),
        (70, torch.float64, "grouped", ("gate", "state")),
        (70, torch.bfloat16, "constant", ("D", "dt_bias")),
        # two chunks and a part of one
        (151, torch.float32, "grouped", ()),
    ],
)
def test_operators_are_sound(fast_backend, draw, requires_grad, l, dtype, B, without):
    inputs = draw(l=l, d=8, B=B, dtype=dtype, without=without)
    inputs = {
        k: v.requires_grad_(requires_grad) if torch.is_tensor(v) else v
        for k, v in inputs.items()
    }
    name = OPERATORS[fast_backend]
    operator = getattr(torch.ops.mambakit, name).default
    # a call that asks for gradients always saves
    torch.library.opcheck(operator, arguments(inputs, name, save=requires_grad))


@pytest.mark.parametrize("l", [0, 70, 151])
@pytest.mark.parametrize("without", [(), ("gate", "state"), ("D", "dt_bias")])
def test_backward_operators_are_sound(fast_backend, draw, without, l):
    inputs = draw(l=l, d=8, B="constant", C="grouped", without=without, dtype=torch.float32)
    inputs["A"] = inputs["A"].T.contiguous().T  # whose gradient is dense all the same
    name = OPERATORS[fast_backend]
    forward = getattr(torch.ops.mambakit, name).default
    y, last, checkpoints = forward(*arguments(inputs, name, save=True))
    *given, softplus, _, _ = arguments(inputs, name, save=True)
    backward = getattr(torch.ops.mambakit, f"{OPERATORS[fast_backend]}_backward").default
    for dlast in (None, torch.ones_like(last)):
        torch.library.opcheck(
            backward, (torch.ones_like(y), dlast, *given, checkpoints, softplus)
        )


@pytest.mark.cpu  # whose checkpoints meta tensors are given the shape of
def test_meta_tensors_have_the_shapes_and_dtypes(fast_backend, draw):
    inputs = draw(dtype=torch.bfloat16)
    name = OPERATORS[fast_backend]
    operator = getattr(torch.ops.mambakit, name).default
    real = operator(*arguments(inputs, name, save=True))
    meta = {k: v.to("meta") if torch.is_tensor(v) else v for k, v in inputs.items()}
    for a, b in zip(operator(*arguments(meta, name, save=True)), real, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        assert a.stride() == b.stride()


@pytest.mark.parametrize("without", [(), ("gate", "state")])
def test_operators_are_sound_for_packs(fast_backend, draw, without):
    inputs = draw(b=1, l=70, d=8, C="grouped", dtype=torch.float32, without=without)
    if "state" in inputs:
        inputs["state"] = draw(b=3, l=1, d=8, dtype=torch.float32)["state"]
    inputs["cu_seqlens"] = packs.ends([30, 1, 39])
    live = {
        k: v.detach().requires_grad_() if torch.is_tensor(v) and v.is_floating_point() else v
        for k, v in inputs.items()
    }
    name = OPERATORS[fast_backend]
    forward, backward = (
        getattr(torch.ops.mambakit, f"{name}{suffix}").default for suffix in ("", "_backward")
    )
    torch.library.opcheck(forward, arguments(live, name, save=True))
    y, last, checkpoints = forward(*arguments(inputs, name, save=True))
    *given, softplus, _, _ = arguments(inputs, name, save=True)
    for dlast in (None, torch.ones_like(last)):
        torch.library.opcheck(
            backward, (torch.ones_like(y), dlast, *given, checkpoints, softplus)
        )


class _Graphs:
    """A compiler backend that counts the graphs it is given."""

    def __init__(self):
        self.count = 0

    def __call__(self, graph, example_inputs):
        self.count += 1
        return torch._dynamo.lookup_backend("aot_eager")(graph, example_inputs)


@pytest.mark.parametrize("train", [False, True])
def test_one_graph_serves_every_length(fast_backend, draw, train):
    torch._dynamo.reset()
    graphs = _Graphs()
    compiled = torch.compile(selective_scan, fullgraph=True, backend=graphs)
    for l in (70, 33, 129, 64, 200):
        inputs = draw(l=l, dtype=torch.float32)
        for name in OVER_TIME:
            torch._dynamo.mark_dynamic(inputs[name], 1)
        leaves = [v.requires_grad_(train) for v in inputs.values() if torch.is_tensor(v)]
        wanted = selective_scan(**inputs, backend=fast_backend)
        got = compiled(**inputs, backend=fast_backend)
        assert_close(got.y, wanted.y, rtol=0, atol=0)
        assert_close(got.state, wanted.state, rtol=0, atol=0)
        if train:
            loss, true = (o.y.sum() + o.state.sum() for o in (got, wanted))
            for a, b in zip(
                torch.autograd.grad(loss, leaves),
                torch.autograd.grad(true, leaves),
                strict=True,
            ):
                assert_close(a, b, rtol=0, atol=0)
    assert graphs.count == 1


@pytest.mark.parametrize("train", [False, True])
def test_one_graph_serves_every_packing(fast_backend, draw, train):
    torch._dynamo.reset()
    graphs = _Graphs()
    compiled = torch.compile(selective_scan, fullgraph=True, backend=graphs)
    inputs = draw(b=1, l=70, dtype=torch.float32)
    inputs["state"] = draw(b=3, l=1, dtype=torch.float32)["state"]
    leaves = [v.requires_grad_(train) for v in inputs.values() if torch.is_tensor(v)]
    for lengths in ([30, 1, 39], [2, 3, 65], [68, 1, 1]):
        how = {"cu_seqlens": packs.ends(lengths), "backend": fast_backend}
        wanted, got = selective_scan(**inputs, **how), compiled(**inputs, **how)
        assert_close(got.y, wanted.y, rtol=0, atol=0)
        assert_close(got.state, wanted.state, rtol=0, atol=0)
        if train:
            a, b = (
                torch.autograd.grad(o.y.sum() + o.state.sum(), leaves) for o in (got, wanted)
            )
            assert_close(a, b, rtol=0, atol=0)
    assert graphs.count == 1


def test_a_compiled_call_looks_at_the_values_of_cu_seqlens(fast_backend, draw):
    torch._dynamo.reset()
    compiled = torch.compile(selective_scan, fullgraph=True, backend="eager")
    inputs = draw(b=1, l=70, without=("state",)) | {"cu_seqlens": packs.ends([30, 39])}
    with pytest.raises(ValueError, match=r"cu_seqlens must end at l=70, got 69$"):
        compiled(**inputs, backend=fast_backend)


@pytest.mark.cpu
def test_a_compiled_call_names_the_steps_between_checkpoints(fused, draw, monkeypatch):
    """Compilers keep on disk what they made of a graph, and find it again by its code."""
    inputs, codes = draw(), []

    def keep(graph, example_inputs):
        codes.append(graph.code)
        return graph

    for steps in (24, 7):
        kernels = scan_kernels._KERNELS["CPU"]._replace(checkpoint_steps=steps)
        monkeypatch.setitem(scan_kernels._KERNELS, "CPU", kernels)
        torch._dynamo.reset()
        torch.compile(selective_scan, fullgraph=True, backend=keep)(**inputs)
        assert f", {steps}, False)" in codes[-1]


@pytest.mark.cpu
def test_checkpoints_of_another_release_are_refused(fused, draw):
    *given, steps, save = arguments(draw(), "selective_scan", save=True)
    with pytest.raises(
        RuntimeError,
        match=rf"cpu kernels keep a state every {steps} steps here, .* for 7$",
    ):
        torch.ops.mambakit.selective_scan(*given, 7, save)


@pytest.mark.cpu
def test_a_forward_is_told_the_steps_that_its_sizes_ask_for(draw):
    asked, told = [], []

    def forward(x, dt, A, *rest, cu_seqlens, **more):
        (b, l, d), n, steps = x.shape, A.shape[1], more.get("steps", 64)
        told.append(more)
        kept = -(-l // steps) if rest[-1] else 0
        return x.clone(), x.new_zeros(b, d, n), x.new_zeros(b * kept, d, n)

    def backward(dy, dlast, *given, **more):
        assert len(given[-2]) == 2 * 2 * 4 * 3  # b * ceil(l / 7) * n * d
        return [torch.full_like(t, 3) if t is not None else None for t in given[:9]]

    def steps_for(*given):
        asked.append(given)
        return 7

    kernels = Kernels(forward, backward, 64, steps_for=steps_for)
    scan = registration.register("scan_told_its_steps", {"CPU": kernels})
    operator = torch.ops.mambakit.scan_told_its_steps
    inputs = draw(l=9, d=3, n=4)
    given = [inputs.get(name) for name in NAMES]
    scan(*given, True)
    assert (asked, told) == ([], [{}])  # nothing is saved
    assert operator(*given, None, True, 64, True)[2].numel() == 2 * 1 * 4 * 3
    assert (asked, told) == ([], [{}] * 2)
    x = given[0].requires_grad_()
    scan(*given, True)[0].sum().backward()
    assert x.grad.eq(3).all()
    assert asked == [(x.device, x.dtype, (2, 9, 3, 4), False)] * 2  # who calls, and the kernel
    assert told[2:] == [{"steps": 7}]
    with pytest.raises(RuntimeError, match=r"every 64 or 7 steps here, .* device, for 9$"):
        operator(*(t.detach() for t in given), None, True, 9, True)


def test_gradients_where_a_gpu_saves_more_states(fused, draw):
    inputs = draw(b=2, l=300, d=40, n=16, dtype=torch.bfloat16)
    leaves = {k: v.requires_grad_() for k, v in inputs.items() if torch.is_tensor(v)}

    def gradients(backend):
        y, state = selective_scan(**inputs, backend=backend)
        return torch.autograd.grad(y.float().sum() + state.sum(), list(leaves.values()))

    for name, found, wanted in zip(
        leaves, gradients("fused"), gradients("reference"), strict=True
    ):
        unit = wanted.float().square().mean().sqrt()
        assert (found - wanted).float().square().mean().sqrt() < 0.01 * unit, name


@pytest.mark.cpu
def test_sizes_that_are_symbols_are_not_asked():
    def never(*given):
        raise AssertionError

    kernels = {"CPU": Kernels(never, never, 64, steps_for=never)}
    sizes = (1, ShapeEnv().create_unbacked_symint(), 32, 16)
    assert registration.steps_to_save(kernels, torch.ones(1), sizes, False) == 64


@pytest.mark.cpu
def test_training_is_exported_with_any_length(fused, draw, monkeypatch):
    """Although the states that are saved may depend on it."""
    kernels = scan_kernels._KERNELS["CPU"]

    def steps_for(device, dtype, sizes, packed):
        assert isinstance(sizes[1] > 100, bool)  # of a symbol it would bind the program
        return kernels.checkpoint_steps

    monkeypatch.setitem(scan_kernels._KERNELS, "CPU", kernels._replace(steps_for=steps_for))

    def inputs(l):
        drawn = draw(l=l, dtype=torch.float32)
        return tuple(drawn[k].requires_grad_() for k in ("x", "dt", "A", "B", "C"))

    l = torch.export.Dim("l", min=2, max=1 << 20)
    dynamic = {"x": {1: l}, "dt": {1: l}, "A": None, "B": {1: l}, "C": {1: l}}
    program = torch.export.export(_Scan("fused"), inputs(70), dynamic_shapes=dynamic)
    for length in (2, 300):
        given = inputs(length)
        assert_close(program.module()(*given).y, _Scan("fused")(*given).y)


@pytest.mark.parametrize("l", [0, 151])
def test_the_gates_gradient_is_written_where_it_is_wanted(fused, draw, l):
    inputs = draw(l=l, d=8, dtype=torch.float32)
    y, last, checkpoints = torch.ops.mambakit.selective_scan(
        *arguments(inputs, "selective_scan", save=True)
    )
    *given, softplus, _, _ = arguments(inputs, "selective_scan", save=True)
    call = (torch.ones_like(y), torch.ones_like(last), *given, checkpoints, softplus)
    operator = torch.ops.mambakit.selective_scan_backward
    wanted = list(operator(*call))
    wide = torch.zeros(2, l, 16)
    found = operator.into(*call, dgate=wide[..., 8:])
    assert torch.equal(wide[..., 8:], wanted.pop(6))
    assert not wide[..., :8].any()
    assert_close(found, wanted, rtol=0, atol=0)
    torch.library.opcheck(operator.into, call, {"dgate": wide[..., 8:]})


@pytest.mark.parametrize("l", [70, 151])
def test_inductor_gives_the_same_values_and_gradients(fast_backend, draw, assert_near, l):
    """Inductor believes the fake kernels' strides and reads the gradients by them."""
    torch._dynamo.reset()
    inputs = draw(b=2, l=l, d=8, n=4, C="grouped", dtype=torch.float32)
    leaves = [v.requires_grad_() for v in inputs.values() if torch.is_tensor(v)]

    def loss(*values):
        given = dict(zip(inputs, [2 * v for v in values], strict=False))
        y, state = selective_scan(**given, dt_softplus=True, backend=fast_backend)
        return y.square().sum() + state.square().sum()

    wanted = loss(*leaves)
    got = torch.compile(loss, fullgraph=True, backend="inductor")(*leaves)
    assert_close(got, wanted)
    for name, a, b in zip(
        inputs,
        torch.autograd.grad(got, leaves),
        torch.autograd.grad(wanted, leaves),
        strict=False,
    ):
        scale = b.abs().max()
        assert_near(a / scale, b / scale, f"gradient of {name}")


def test_a_step_compiles_to_one_graph(fast_backend, draw):
    torch._dynamo.reset()
    inputs = draw(l=1, dtype=torch.float32)
    at = {k: v[:, 0] if k in OVER_TIME else v for k, v in inputs.items()}
    compiled = torch.compile(selective_step, fullgraph=True, backend="aot_eager")
    wanted = selective_step(**at, backend=fast_backend)
    got = compiled(**at, backend=fast_backend)
    assert_close(got.y, wanted.y, rtol=0, atol=0)
    assert_close(got.state, wanted.state, rtol=0, atol=0)


def test_bad_input_is_refused_while_tracing(draw):
    torch._dynamo.reset()
    inputs = draw(dtype=torch.float32)
    compiled = torch.compile(selective_scan, backend="eager")
    with pytest.raises(ValueError, match="selective_scan: D must have shape"):
        compiled(**inputs | {"D": torch.ones(5)})


class _Scan(torch.nn.Module):
    def __init__(self, backend):
        super().__init__()
        self.backend = backend

    def forward(self, x, dt, A, B, C):
        return selective_scan(x, dt, A, B, C, backend=self.backend)


def test_export_with_any_length(fast_backend, draw):
    def inputs(l):
        drawn = draw(l=l, dtype=torch.float32)
        return tuple(drawn[k] for k in ("x", "dt", "A", "B", "C"))

    l = torch.export.Dim("l", min=2, max=1 << 20)
    dynamic = {"x": {1: l}, "dt": {1: l}, "A": None, "B": {1: l}, "C": {1: l}}
    program = torch.export.export(_Scan(fast_backend), inputs(70), dynamic_shapes=dynamic)
    for length in (2, 65, 300):
        got = program.module()(*inputs(length))
        wanted = _Scan(fast_backend)(*inputs(length))
        assert_close(got.y, wanted.y, rtol=0, atol=0)
        assert_close(got.state, wanted.state, rtol=0, atol=0)
