"""The step says what the model's forward says; without a GPU, on the emulator."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from mambakit import MambaConfig, MambaLM
from mambakit.generation import generate
from mambakit.generation.gpu_step import GPUStep, launches, refusal, step as step_module
from mambakit.generation.gpu_step.multiplication import Multiplication
from mambakit.generation.stepping import stepper
from mambakit.models import ModelState
from mambakit.modules import MixerState
from mambakit.ops import _cuda

from .conftest import SIZES

# How many times the model's own error the step's may be, both against float32.
_MOST = 1.5


def assert_same_state(state, wanted, tolerance=1e-5):
    for layer, wanted_layer in zip(state.layers, wanted.layers, strict=True):
        for mine, other in zip(layer, wanted_layer, strict=True):
            assert_close(mine, other, rtol=tolerance, atol=tolerance)


def assert_equal_outputs(a, b):
    assert torch.equal(a.logits, b.logits)
    for layer, other in zip(a.state.layers, b.state.layers, strict=True):
        assert torch.equal(layer.conv, other.conv)
        assert torch.equal(layer.ssm, other.ssm)


def error(got, wanted):
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize("name", SIZES)
def test_equals_the_forward(make_model, draw, name):
    model = make_model(**SIZES[name])
    step, tokens = GPUStep(model), draw(3, 4)
    state = wanted_state = None
    for t in range(tokens.shape[1]):
        logits, state = step(tokens[:, t], state)
        wanted, wanted_state = model(tokens[:, t : t + 1], wanted_state)
        assert_close(logits, wanted[:, 0], rtol=1e-5, atol=1e-5)
        assert_same_state(state, wanted_state)


@pytest.mark.parametrize("b", range(1, 10))
def test_equals_the_forward_for_any_number_of_sequences(make_model, draw, b):
    model = make_model()
    tokens = draw(b, 5)
    logits, state = GPUStep(model)(tokens[:, 4], model(tokens[:, :4]).state)
    wanted = model(tokens)
    assert_close(logits, wanted.logits[:, 4], rtol=1e-5, atol=1e-5)
    assert_same_state(state, wanted.state)


@pytest.mark.parametrize(
    ("dtype", "weights", "b"),
    [
        (torch.bfloat16, None, 1),
        (torch.bfloat16, None, 9),
        (torch.float16, None, 3),
        (torch.float32, "bf16", 3),
        (torch.float32, "int8", 3),
        (torch.bfloat16, "int8", 9),
        (torch.float16, "int8", 3),
        # from here on a library multiplies the large matrices, or may not
        (torch.bfloat16, None, 27),
        (torch.float16, None, 33),
        (torch.float32, "bf16", 27),
        (torch.bfloat16, "int8", 27),
    ],
)
def test_errs_no_more_than_the_forward_in_short_numbers(
    make_model, as_read, draw, dtype, weights, b
):
    model = make_model(dtype, d_model=40, dt_rank=3, d_state=5 if b < 16 else 16)
    exact = as_read(model, weights)
    eager = copy.deepcopy(exact).to(dtype if dtype != torch.float32 else torch.bfloat16)
    tokens = draw(b, 6)
    step, state = GPUStep(model, weights), None
    for t in range(6):
        logits, state = step(tokens[:, t], state)
    wanted, theirs = exact(tokens), eager(tokens)
    assert logits.dtype == torch.float32
    assert state.layers[0].conv.dtype == dtype
    assert error(logits, wanted.logits[:, 5]) <= _MOST * error(
        theirs.logits[:, 5], wanted.logits[:, 5]
    )
    for mine, other, best in zip(
        state.layers, theirs.state.layers, wanted.state.layers, strict=True
    ):
        assert error(mine.ssm, best.ssm) <= _MOST * error(other.ssm, best.ssm)


MANY = {
    "no window": {"d_model": 24, "d_conv": 1, "dt_rank": 1},
    "bias": {"d_model": 24, "d_conv": 2, "dt_rank": 3, "bias": True, "conv_bias": False},
    "more channels than a block": {"d_model": 80, "dt_rank": 35, "d_conv": 3},
    # of a rank of 1 a norm would leave the sign alone, which any rounding may turn
    "norms": {"d_model": 16, "d_state": 32, "dt_rank": 8, "selection_norm_eps": 1e-6},
    "odd vocabulary": {"d_model": 16, "pad_vocab_size_multiple": 1},
    "window of 5": {"d_model": 16, "d_state": 32, "expand": 1, "d_conv": 5},
}


@pytest.mark.parametrize("name", MANY)
def test_many_sequences_err_no_more_than_the_forward(
    make_model, as_read, draw, name, monkeypatch
):
    # so few multiprocessors that a block has more sequences than it has room for at once
    monkeypatch.setattr(_cuda, "multiprocessors", lambda _: 1)
    model = make_model(torch.bfloat16, **({"d_state": 16} | MANY[name]))
    tokens, exact = draw(45, 5), as_read(model, None)
    step, state = GPUStep(model), None
    for t in range(5):
        logits, state = step(tokens[:, t], state)
    wanted, theirs = exact(tokens), model(tokens)
    assert error(logits, wanted.logits[:, 4]) <= _MOST * error(
        theirs.logits[:, 4], wanted.logits[:, 4]
    )
    for mine, other, best in zip(
        state.layers, theirs.state.layers, wanted.state.layers, strict=True
    ):
        assert error(mine.ssm, best.ssm) <= _MOST * error(other.ssm, best.ssm)
        assert_close(mine.conv.float(), best.conv, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("b", [3, 40, 400])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_start_early_unless_many_blocks_wait_for_places(
    make_model, monkeypatch, dtype, b
):
    monkeypatch.setattr(launches, "_can_overlap", lambda _: True)
    step = GPUStep(make_model(dtype, d_state=16))
    rest = launches.Launches(step._packed, b).rest
    early = [getattr(launch, "overlaps", False) for launch in rest]
    by_library = [isinstance(launch, Multiplication) for launch in rest]
    short = dtype == torch.bfloat16
    assert any(by_library) == (short and b > 16)
    assert early[0] is False
    # what follows out_proj is the sum of what a layer adds
    added = [launch.name == "add" and short and b > 16 for launch in rest]
    assert early[1:] == [
        (short or b == 3) and not (library or sums)
        for library, sums in zip(by_library[1:], added[1:], strict=True)
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grids_have_room_for_very_many_sequences(make_model, monkeypatch, dtype):
    packed = GPUStep(make_model(dtype, d_model=8, d_state=16, vocab_size=8))._packed
    monkeypatch.setattr(_cuda, "kernel", lambda *_: None)
    rest = launches.Launches(packed, 70_016).rest
    grids = [launch.grid for launch in rest if isinstance(launch, launches.Launch)]
    assert len(grids) == (2 * 4 if dtype == torch.bfloat16 else 2 * 5 + 1)
    assert all(1 <= y <= 65535 and 1 <= z <= 65535 for _, y, z in grids)


def test_few_and_many_sequences_take_turns(make_model, draw):
    step, tokens = GPUStep(make_model(torch.bfloat16, d_state=16)), draw(40, 3)
    state = step(tokens[:, 0]).state
    many = step(tokens[:, 1], state)
    few = step(tokens[:5, 1], state[:5])
    assert_close(many.logits[:5], few.logits, rtol=0.05, atol=0.05)
    after = step(tokens[:, 2], many.state)
    assert torch.equal(step(tokens[:33, 2], many.state[:33]).logits, after.logits[:33])


def test_a_short_models_own_state_is_taken_and_given_back(make_model, draw):
    model = make_model(torch.bfloat16)
    tokens = draw(2, 6)
    state = GPUStep(model)(tokens[:, 3], model(tokens[:, :3]).state).state
    resumed = model(tokens[:, 4:], state).logits
    assert_close(resumed, model(tokens).logits[:, 4:], rtol=0.1, atol=0.1)


def test_step_and_forward_take_turns(make_model, draw):
    model = make_model()
    step, tokens = GPUStep(model), draw(3, 12)
    wanted = model(tokens)
    state = model(tokens[:, :4]).state
    for t in (4, 5):
        logits, state = step(tokens[:, t], state)
        assert_close(logits, wanted.logits[:, t], rtol=1e-5, atol=1e-5)
    logits, state = model(tokens[:, 6:9], state)
    assert_close(logits, wanted.logits[:, 6:9], rtol=1e-5, atol=1e-5)
    for t in (9, 10, 11):
        logits, state = step(tokens[:, t], state)
    assert_close(logits, wanted.logits[:, 11], rtol=1e-5, atol=1e-5)
    assert_same_state(state, wanted.state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("b", [4, 40])
def test_a_sequence_does_not_see_its_neighbours(make_model, draw, b, dtype):
    step, tokens = GPUStep(make_model(dtype, d_state=16)), draw(b, 2)
    before = step(tokens[:, 0]).state
    together = step(tokens[:, 1], before)
    most = b - 1
    some = step(tokens[:most, 1], before[:most])
    assert_equal_outputs(some, type(some)(together.logits[:most], together.state[:most]))


def test_a_state_is_a_value(make_model, draw):
    step, tokens = GPUStep(make_model()), draw(2, 3)
    state = step(tokens[:, 0]).state
    first = step(tokens[:, 1], state)
    kept = first.logits.clone()
    step(tokens[:, 2], first.state)
    assert_equal_outputs(step(tokens[:, 1], state), first)
    assert torch.equal(first.logits, kept)


def test_rows_of_a_state_may_be_gathered_and_forked(make_model, draw):
    step, tokens = GPUStep(make_model()), draw(3, 2)
    state = step(tokens[:, 0]).state
    whole = step(tokens[:, 1], state)
    index = torch.tensor([2, 0])
    assert_close(step(tokens[index, 1], state[index]).logits, whole.logits[index])
    logits = step(tokens[:1, 1].expand(3), state[0].fork(3)).logits
    assert_close(logits, whole.logits[:1].expand(3, -1))


def test_what_is_in_one_piece_is_not_copied(make_model, draw):
    model, tokens = make_model(), draw(3, 1)[:, 0]
    state = GPUStep(model)(tokens).state
    for whole in (state, state.detach(), state.to(tokens.device), state[:]):
        conv, ssm = step_module._in_one_piece(whole, torch.float32)
        assert ssm.data_ptr() == state.layers[0].ssm.data_ptr()
        assert conv.data_ptr() == state.layers[0].conv.data_ptr()
    shifted = torch.empty(state.stacks.ssm.numel() + 1)[1:].view_as(state.stacks.ssm)
    shifted = ModelState.stacked(state.stacks.conv, shifted.copy_(state.stacks.ssm))
    short = state.to(dtype=torch.bfloat16)
    pieces = model(tokens[:, None]).state, ModelState(state.layers[::-1]), state[1:]
    for other in (*pieces, state[torch.tensor([0, 1])], shifted, short):
        conv, ssm = step_module._in_one_piece(other, torch.float32)
        assert conv.is_contiguous()
        assert ssm.is_contiguous()
        assert conv.data_ptr() % 16 == ssm.data_ptr() % 16 == 0
        for i, layer in enumerate(other.layers):
            assert torch.equal(ssm[i], layer.ssm)
            assert torch.equal(conv[i], layer.conv.transpose(1, 2).float())


def test_no_sequences_are_no_work(make_model, draw):
    logits, state = GPUStep(make_model())(draw(0, 1)[:, 0])
    assert logits.shape == (0, 264)
    assert len(state) == 0


def test_tokens_may_be_int32(make_model, draw):
    step, tokens = GPUStep(make_model()), draw(2, 1)[:, 0]
    assert_equal_outputs(step(tokens.int()), step(tokens))


@pytest.mark.parametrize("token", [-1, 257, 2**40])
def test_a_token_outside_the_vocabulary_spoils_its_own_row_alone(make_model, draw, token):
    step, tokens = GPUStep(make_model()), draw(3, 1)[:, 0]
    wanted = step(tokens).logits
    tokens[1] = token
    logits = step(tokens).logits
    assert logits[1].isnan().all()
    assert torch.equal(logits[[0, 2]], wanted[[0, 2]])


@pytest.mark.parametrize("weights", [None, "bf16", "int8"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_no_numbers_show(make_model, draw, weights, value):
    model = make_model()
    model.backbone.layers[0].mixer.x_proj.weight[2, 5] = value
    assert GPUStep(model, weights)(draw(2, 1)[:, 0]).logits.isnan().all()


@pytest.mark.parametrize("b", [3, 35])
def test_a_state_that_is_no_number_spoils_its_own_row_alone(make_model, draw, b):
    step, tokens = GPUStep(make_model(torch.bfloat16, d_state=16)), draw(b, 2)
    state = step(tokens[:, 0]).state
    wanted = step(tokens[:, 1], state)
    spoilt = state.layers[0].ssm.clone()
    spoilt[1] = torch.nan
    layers = (MixerState(state.layers[0].conv, spoilt), *state.layers[1:])
    logits = step(tokens[:, 1], ModelState(layers)).logits
    others = torch.arange(b) != 1
    assert logits[1].isnan().all()
    assert torch.equal(logits[others], wanted.logits[others])


# ---------------------------------------------------------------- the life of a step


@pytest.mark.parametrize("weights", [None, "bf16"])
def test_generation_takes_the_step(make_model, draw, weights):
    model = make_model()
    assert isinstance(stepper(model, weights), GPUStep)
    prompt = draw(2, 3)
    tokens = generate(model, prompt, max_new_tokens=5, temperature=0, weights=weights)
    step, (logits, state) = GPUStep(model, weights), model(prompt, last_only=True)
    logits = logits[:, 0]
    for t in range(3, 8):
        assert torch.equal(tokens[:, t], logits[:, :257].argmax(dim=-1))
        logits, state = step(tokens[:, t], state)
    if weights is None:
        wanted = model(tokens[:, :-1]).logits[:, 2:, :257].argmax(dim=-1)
        assert torch.equal(tokens[:, 3:], wanted)


@pytest.mark.parametrize("weights", [None, "int8"])
def test_a_change_of_parameters_is_followed(make_model, draw, weights):
    model, tokens = make_model(), draw(2, 1)[:, 0]
    step = GPUStep(model, weights)
    before = step(tokens).logits
    model.backbone.layers[1].mixer.D.mul_(2)
    after = step(tokens).logits
    assert not torch.equal(after, before)
    assert torch.equal(after, GPUStep(model, weights)(tokens).logits)
    model.backbone.layers[0].mixer.out_proj.weight.data.mul_(2)
    assert not torch.equal(GPUStep(model, weights)(tokens).logits, after)


def test_the_steps_of_a_model_share_what_was_packed(make_model):
    model = make_model()
    first, second, other = GPUStep(model), GPUStep(model), GPUStep(model, "int8")
    assert first._packed is second._packed
    assert first._packed is not other._packed


def test_matrices_are_read_where_they_are(make_model):
    model = make_model(torch.bfloat16, d_model=64)
    packed = GPUStep(model)._packed
    mixer = model.backbone.layers[1].mixer
    assert packed.layers[1].in_proj.weights.data_ptr() == mixer.in_proj.weight.data_ptr()
    assert packed.head.weights.data_ptr() == model.lm_head.weight.data_ptr()


def test_a_token_reads_the_weights_that_were_asked_for(make_model):
    # of a size at which all but the matrices is little
    model = make_model(d_model=256)
    whole, half, quarter = (GPUStep(model, w).nbytes for w in (None, "bf16", "int8"))
    assert 0.5 < half / whole < 0.53
    assert 0.25 < quarter / whole < 0.29


def test_a_few_graphs_are_kept(make_model, draw, monkeypatch):
    monkeypatch.setattr(step_module, "_MOST_GRAPHS", 2)
    step = GPUStep(make_model())
    wanted = [step(draw(b, 1)[:, 0]).logits.shape[0] for b in (1, 2, 1, 4)]
    assert wanted == [1, 2, 1, 4]
    assert list(step._graphs._kept) == [1, 4]


# ---------------------------------------------------------------- refusals


def _adapter(model):
    model.backbone.layers[0].mixer.out_proj = nn.Linear(48, 24)
    return model


def _hooked(model):
    model.backbone.layers[1].register_forward_hook(lambda *_: None)
    return model


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_adapter, "backbone.layers.0.mixer.out_proj is a Linear"),
        (_hooked, "backbone.layers.1 has hooks or a forward of its own"),
        (lambda model: model.to("meta"), "the model is on meta, not on a GPU of CUDA"),
        (lambda model: model.double(), "the model is in float64, not in one of"),
        (lambda _: nn.Linear(2, 2), "the model is a Linear, not a MambaLM"),
        (
            lambda model: MambaLM(model.config, backend="reference"),
            "the model names another backend, 'reference'",
        ),
        (
            lambda _: MambaLM(MambaConfig(8, 1, 8, dt_rank=1025)),
            "dt_rank is 1025, more than 1024",
        ),
    ],
)
def test_what_the_step_cannot_stand_for_is_refused(make_model, change, reason):
    model = change(make_model())
    assert reason in refusal(model)
    with pytest.raises(RuntimeError, match=r"^GPUStep: it cannot stand for this model: "):
        GPUStep(model)


def test_a_machine_without_kernels_is_told(make_model, monkeypatch):
    model = make_model()
    monkeypatch.setattr(step_module, "_why_no_kernels", lambda _: "the CUDA kernels need more")
    assert refusal(model) == "the CUDA kernels need more"


def test_gradients_are_refused(make_model, draw):
    model, tokens = make_model(), draw(2, 1)[:, 0]
    step = GPUStep(model)
    model.backbone.norm_f.requires_grad_()
    with pytest.raises(RuntimeError, match=r"^GPUStep: it passes no gradients on"):
        step(tokens)
    with torch.no_grad():
        step(tokens)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([1, 2], "tokens must be a tensor, got list"),
        (torch.ones(2, 1, dtype=torch.int64), r"shape \(b,\), got int64 of shape \(2, 1\)"),
        (torch.ones(2), "int64 or int32 of shape"),
        (torch.ones(2, dtype=torch.int64, device="meta"), "tokens must be on "),
    ],
)
def test_wrong_tokens_are_one_sentence(make_model, tokens, message):
    with pytest.raises(ValueError, match=f"^GPUStep: .*{message}"):
        GPUStep(make_model())(tokens)


def test_wrong_states_are_one_sentence(make_model, draw):
    model, tokens = make_model(), draw(2, 1)[:, 0]
    step = GPUStep(model)
    state = model(tokens[:, None]).state
    for wrong, message in (
        ("state", "state must be a ModelState or None, got str"),
        (ModelState(state.layers[:1]), "state must have 2 layers, got 1"),
        (state[:1], r"state must have conv of \(2, 48, 3\) in layer 0, got \(1, 48, 3\)"),
        (make_model(d_state=3)(tokens[:, None]).state, r"state must have ssm of \(2, 48, 5\)"),
        (state.to(device="meta"), "state must be on "),
    ):
        with pytest.raises(ValueError, match=f"^GPUStep: {message}"):
            step(tokens, wrong)


def test_unknown_weights_are_one_sentence(make_model):
    with pytest.raises(ValueError, match=r"^GPUStep: weights must be None or one of bf16"):
        GPUStep(make_model(), "int4")
