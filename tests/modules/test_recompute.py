"""Laws of the mixer that recomputes: the same numbers and gradients, and less kept for them."""

import pytest
import torch
from torch.testing import assert_close

from mambakit.modules import Mamba, MixerState
from mambakit.ops import _backends
from mambakit.ops.scan import fused as scan_kernels
from mambakit.ops.scan.fused import checkpoint_steps


@pytest.fixture(autouse=True)
def _needs_the_kernels(device):
    why_not = _backends.why_not_fused("Mamba", device)
    if why_not is not None:
        pytest.skip(f"the operator is made of the fused kernels, and {why_not}")


@pytest.fixture
def recompute(monkeypatch):
    """Say whether mixers recompute, whatever they would choose."""

    def say(yes):
        monkeypatch.setattr(Mamba, "_recomputes", lambda self, device: yes)

    return say


@pytest.fixture
def lean(recompute):
    """Let mixers recompute on the CPU too."""
    recompute(True)


def make(dtype=torch.float64, **sizes):
    torch.manual_seed(0)
    return Mamba(6, **{"d_state": 3, "d_conv": 3} | sizes, dtype=dtype)


def draw(l=9, b=2, dtype=torch.float64):
    source = torch.Generator().manual_seed(l)
    u = torch.randn(b, l, 6, dtype=dtype, generator=source, device="cpu")
    return u.to(torch.get_default_device()).requires_grad_()


def begin(mixer, b=2, dtype=torch.float64):
    d, _, w = mixer.conv1d.weight.shape
    return MixerState(
        torch.randn(b, d, w - 1, dtype=dtype).requires_grad_(),
        torch.randn(b, d, mixer.d_state, dtype=torch.promote_types(dtype, torch.float32))
        .requires_grad_(),
    )  # fmt: skip


def outputs_and_gradients(mixer, u, state=None, **kind):
    y, end = mixer(u, state, **kind)
    inputs = [u, *mixer.parameters(), *(state or ())]
    loss = y.square().sum() + end.conv.sin().sum() + end.ssm.cos().sum()
    return (y, *end), torch.autograd.grad(loss, inputs)


@pytest.fixture
def assert_both_ways_agree(recompute):
    """Compare what a mixer computes when it recomputes with what it does when it keeps all."""

    def check(mixer, u, state=None, cu_seqlens=None, **tolerance):
        recompute(False)
        expected = outputs_and_gradients(mixer, u, state, cu_seqlens=cu_seqlens)
        recompute(True)
        found = outputs_and_gradients(mixer, u, state, cu_seqlens=cu_seqlens)
        assert_close(found, expected, **tolerance)

    return check


@pytest.mark.parametrize("l", [0, 1, 2, 40])
@pytest.mark.parametrize("conv_bias", [True, False])
@pytest.mark.parametrize("goes_on", [True, False])
def test_recomputing_changes_neither_values_nor_gradients(
    assert_both_ways_agree, l, conv_bias, goes_on
):
    mixer = make(conv_bias=conv_bias)
    assert_both_ways_agree(mixer, draw(l), begin(mixer) if goes_on else None)


PACK = torch.tensor([0, 2, 3, 20, 40], device="cpu")


@pytest.mark.parametrize("goes_on", [True, False])
def test_recomputing_a_pack_changes_nothing_either(assert_both_ways_agree, goes_on):
    mixer = make()
    state = begin(mixer, b=4) if goes_on else None
    assert_both_ways_agree(mixer, draw(40, b=1), state, PACK)


def test_bfloat16_agrees_within_its_rounding(assert_both_ways_agree):
    mixer = make(torch.bfloat16)
    state = begin(mixer, dtype=torch.bfloat16)
    u = draw(20, dtype=torch.bfloat16)
    assert_both_ways_agree(mixer, u, state, rtol=2e-2, atol=2e-2)


def test_under_autocast_too(assert_both_ways_agree, device):
    mixer, u = make(torch.float32), draw(20, dtype=torch.float32)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert_both_ways_agree(mixer, u, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("part", ["conv", "ssm"])
def test_a_gradient_may_come_through_the_state_alone(recompute, part):
    mixer, u = make(), draw()

    def gradient():
        return torch.autograd.grad(getattr(mixer(u)[1], part).square().sum(), u)[0]

    recompute(False)
    expected = gradient()
    recompute(True)
    assert_close(gradient(), expected)


def test_gradcheck(lean):
    mixer = make()
    state = begin(mixer, b=1)

    def run(u, conv, ssm):
        y, end = mixer(u, MixerState(conv, ssm))
        return y, *end

    assert torch.autograd.gradcheck(run, (draw(5, b=1), *state), fast_mode=True)


def test_neither_the_convolution_nor_the_step_is_kept(recompute):
    mixer, u = make(torch.float32), draw(64, dtype=torch.float32)
    half = u.shape[0] * u.shape[1] * mixer.D.numel()

    def kept_halves():
        sizes = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: sizes.setdefault(t.untyped_storage().data_ptr(), t.numel()) and t,
            lambda t: t,
        ):
            mixer(u)
        return sum(size >= half for size in sizes.values())

    recompute(False)
    assert kept_halves() == 4
    recompute(True)
    assert kept_halves() == 2  # in_proj's output and out_proj's input


@pytest.mark.compiles
def test_a_compiler_takes_it_in_one_graph(lean):
    torch.compiler.reset()
    mixer, u = make(torch.float32), draw(dtype=torch.float32)
    expected = outputs_and_gradients(mixer, u)
    compiled = torch.compile(mixer, fullgraph=True, backend="aot_eager")
    y, end = compiled(u)
    loss = y.square().sum() + end.conv.sin().sum() + end.ssm.cos().sum()
    gradients = torch.autograd.grad(loss, [u, *mixer.parameters()])
    assert_close(((y, *end), gradients), expected)


@pytest.mark.compiles
def test_a_compiler_takes_packs_of_one_number_of_sequences_in_one_graph(lean):
    torch.compiler.reset()
    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph

    mixer = make()
    compiled = torch.compile(mixer, fullgraph=True, backend=count)
    for cuts in ([0, 2, 3, 20, 40], [0, 1, 30, 38, 40]):
        pack = torch.tensor(cuts, device="cpu")
        y, end = compiled(draw(40, b=1), cu_seqlens=pack)
        expected, state = mixer(draw(40, b=1), cu_seqlens=pack)
        assert_close((y, *end), (expected, *state))
    assert len(graphs) == 1


@pytest.mark.compiles
@pytest.mark.parametrize(
    ("goes_on", "pack"), [(True, None), (False, None), (True, [0, 1, 5]), (False, [0, 1, 5])]
)
def test_the_operator_is_registered_soundly(goes_on, pack):
    mixer, b = make(torch.float32), 2
    state = begin(mixer, dtype=torch.float32) if goes_on else (None, None)
    if pack is not None:
        pack, b = torch.tensor(pack, device="cpu"), 1
    inputs = (
        torch.randn(b, 5, 24, requires_grad=True),
        mixer.conv1d.weight.squeeze(1), mixer.conv1d.bias, mixer.x_proj.weight,
        mixer.dt_proj.weight, -torch.exp(mixer.A_log), mixer.D, mixer.dt_proj.bias, *state,
    )  # fmt: skip
    inputs = [t if t is None else t.detach().requires_grad_() for t in inputs]
    torch.library.opcheck(
        torch.ops.mambakit.mix.default,
        (*inputs, pack, checkpoint_steps(inputs[0].device), False),
    )


@pytest.mark.compiles
@pytest.mark.cpu
def test_a_compiled_call_names_the_steps_between_checkpoints(lean):
    """Without them a compiler would take what it kept on disk of a release with others."""
    torch.compiler.reset()
    codes = []

    def keep(graph, example_inputs):
        codes.append(graph.code)
        return graph

    torch.compile(make(), fullgraph=True, backend=keep)(draw())
    assert f", {checkpoint_steps(torch.device('cpu'))}, False)" in codes[0]


@pytest.mark.cpu
@pytest.mark.parametrize("packed", [False, True])
def test_the_scans_own_sizes_say_which_states_are_saved(lean, monkeypatch, packed):
    kernels, asked = scan_kernels._KERNELS["CPU"], []

    def steps_for(*given):
        asked.append(given)
        return kernels.checkpoint_steps

    monkeypatch.setitem(scan_kernels._KERNELS, "CPU", kernels._replace(steps_for=steps_for))
    mixer = make()
    u = draw()[:1].detach()
    pack = {"cu_seqlens": torch.tensor([0, 2, u.shape[1]])} if packed else {}
    y, _ = mixer(u, **pack)
    assert y.requires_grad
    sizes = (1, u.shape[1], *mixer.A_log.shape)
    assert asked == [(u.device, u.dtype, sizes, packed)]


def test_second_derivatives_are_refused(lean):
    mixer, u = make(), draw()
    with pytest.raises(RuntimeError, match="second derivatives exist only with"):
        torch.autograd.grad(mixer(u)[0].square().sum(), u, create_graph=True)


@pytest.mark.parametrize("part", [0, 1])
def test_another_models_state_is_refused(lean, part):
    mixer = make()
    state = list(begin(mixer))
    state[part] = state[part][:, :-1]
    with pytest.raises(ValueError, match="Mamba: state must have"):
        mixer(draw(), MixerState(*state))


def test_it_is_chosen_on_a_gpu_for_the_modules_own_projections_alone(device):
    gpu = torch.device("cuda")
    assert make()._recomputes(device) is (device.type == "cuda")
    hooked, replaced = make(backend="fused"), make(backend="fused")
    hooked.x_proj.register_forward_hook(lambda *arguments: None)
    replaced.dt_proj = torch.nn.Linear(3, 3)
    for mixer in (hooked, replaced, make(selection_norm_eps=1e-6), make(backend="reference")):
        assert not mixer._recomputes(gpu)
    with torch.no_grad():
        assert not make(backend="fused")._recomputes(gpu)
