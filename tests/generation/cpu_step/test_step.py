"""The compiled step says what the model's forward says."""

import concurrent.futures
import copy
import gc
import os
import subprocess
import sys
import weakref

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from mambakit import MambaConfig, MambaLM
from mambakit.generation.cpu_step import (
    CPUStep,
    library as step_library,
    refusal,
    rounded,
    step as step_module,
)
from mambakit.models import ModelState
from mambakit.modules import MixerState, RMSNorm
from mambakit.ops import _native

from .conftest import SIZES

WHY_NOT = _native.unavailable()

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT)),
]


def assert_same_state(state, wanted):
    for layer, wanted_layer in zip(state.layers, wanted.layers, strict=True):
        assert_close(layer.conv, wanted_layer.conv, rtol=1e-5, atol=1e-5)
        assert_close(layer.ssm, wanted_layer.ssm, rtol=1e-5, atol=1e-5)


def assert_equal_outputs(a, b):
    assert torch.equal(a.logits, b.logits)
    for layer, other in zip(a.state.layers, b.state.layers, strict=True):
        assert torch.equal(layer.conv, other.conv)
        assert torch.equal(layer.ssm, other.ssm)


@pytest.mark.parametrize("weights", [None, "bf16", "int8"])
@pytest.mark.parametrize("name", SIZES)
def test_equals_the_forward_of_a_model_with_the_same_weights(
    library, make_model, draw, name, weights
):
    model = make_model(**SIZES[name])
    step = CPUStep(model, weights)
    same = model if weights is None else rounded(model, weights)
    for b in (1, 2, 7, 9) if name != "wide" else (1, 13):
        tokens = draw(b, 5)
        state = wanted_state = None
        for t in range(tokens.shape[1]):
            logits, state = step(tokens[:, t], state)
            wanted, wanted_state = same(tokens[:, t : t + 1], wanted_state)
            assert_close(logits, wanted[:, 0], rtol=1e-5, atol=1e-5)
            assert_same_state(state, wanted_state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_short_model_is_read_as_it_is_and_computed_in_float32(
    library, make_model, draw, dtype
):
    model = make_model(dtype)
    same = copy.deepcopy(model).float()
    tokens = draw(3, 4)
    logits, state = CPUStep(model)(tokens[:, 3], same(tokens[:, :3]).state)
    wanted = same(tokens)
    assert logits.dtype == torch.float32
    assert_close(logits, wanted.logits[:, 3], rtol=1e-5, atol=1e-5)
    assert_same_state(state, wanted.state)


def test_a_short_models_own_state_is_taken_and_given_back(make_model, draw):
    model = make_model(torch.bfloat16)
    tokens = draw(2, 6)
    state = CPUStep(model)(tokens[:, 3], model(tokens[:, :3]).state).state
    resumed = model(tokens[:, 4:], state).logits
    assert_close(resumed, model(tokens).logits[:, 4:], rtol=0.1, atol=0.1)


def test_step_and_forward_take_turns(make_model, draw):
    model = make_model()
    step, tokens = CPUStep(model), draw(3, 12)
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


@pytest.mark.parametrize("weights", [None, "bf16", "int8"])
@pytest.mark.parametrize("name", SIZES)
def test_a_few_tokens_read_at_once_are_as_many_steps(library, make_model, draw, name, weights):
    model = make_model(**SIZES[name])
    step = CPUStep(model, weights)
    for b, l in ((1, 6), (2, 3), (1, 1)) if name != "wide" else ((2, 7),):
        tokens = draw(b, l)
        for before in (None, model(draw(b, 3)).state):
            logits, states = step.read(tokens, before)
            assert len(states) == b * l
            state = before
            for t in range(l):
                after = step(tokens[:, t], state)
                rows = [i * l + t for i in range(b)]
                assert_equal_outputs(type(after)(logits[:, t], states[rows]), after)
                state = after.state


@pytest.mark.parametrize("weights", [None, "int8"])
def test_a_hundred_tokens_later_it_is_still_the_forward(make_model, draw, weights):
    model = make_model()
    step, tokens = CPUStep(model, weights), draw(1, 100)
    state = None
    for t in range(100):
        logits, state = step(tokens[:, t], state)
    wanted = (model if weights is None else rounded(model, weights))(tokens)
    assert_close(logits, wanted.logits[:, -1], rtol=1e-5, atol=1e-5)
    assert_same_state(state, wanted.state)


@pytest.mark.parametrize("weights", [None, "bf16", "int8"])
def test_a_sequence_does_not_see_its_neighbours(library, make_model, draw, weights):
    model = make_model(d_model=72)
    step, tokens = CPUStep(model, weights), draw(9, 2)
    before = step(tokens[:, 0]).state
    together = step(tokens[:, 1], before)
    for b in range(1, 10):
        some = step(tokens[:b, 1], before[:b])
        assert torch.equal(some.logits, together.logits[:b])
        assert_equal_outputs(some, type(some)(together.logits[:b], together.state[:b]))


@pytest.mark.parametrize("weights", [None, "bf16", "int8"])
def test_the_number_of_threads_changes_no_bit(library, make_model, draw, weights):
    model = make_model(d_model=264)
    step, tokens = CPUStep(model, weights), draw(3, 2)
    threads = torch.get_num_threads()
    try:
        outputs = []
        for count in (1, 2, 5, 20):
            torch.set_num_threads(count)
            outputs.append(step(tokens[:, 1], step(tokens[:, 0]).state))
    finally:
        torch.set_num_threads(threads)
    for output in outputs[1:]:
        assert_equal_outputs(output, outputs[0])


# The child computes with the step alone: torch's own threads do not survive a fork.
FORKED = """
import os, signal, sys, time, torch
from mambakit import MambaConfig, MambaLM
from mambakit.generation.cpu_step import CPUStep
torch.set_num_threads(2)
model = MambaLM(MambaConfig(d_model=264, n_layer=2, vocab_size=500)).requires_grad_(False)
step, tokens = CPUStep(model), torch.tensor([1, 2])
before = step(tokens).logits.tolist()
child = os.fork()
if child == 0:
    os._exit(0 if step(tokens).logits.tolist() == before else 1)
# Looks are counted, not seconds: a machine that is held up holds up parent and child alike.
for _ in range(1200):
    ended, status = os.waitpid(child, os.WNOHANG)
    if ended:
        sys.exit(os.waitstatus_to_exitcode(status))
    time.sleep(0.05)
os.kill(child, signal.SIGKILL)
sys.exit("the child waits for ever")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_a_forked_child_runs_it_on_threads_of_its_own():
    done = subprocess.run(
        [sys.executable, "-c", FORKED], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_several_python_threads_may_share_a_step(make_model, draw):
    step, tokens = CPUStep(make_model(d_model=264)), draw(2, 6)

    def last_logits(_):
        state = None
        for t in range(tokens.shape[1]):
            logits, state = step(tokens[:, t], state)
        return logits

    expected = last_logits(0)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for logits in pool.map(last_logits, range(12)):
            assert torch.equal(logits, expected)


def test_a_state_is_a_value(make_model, draw):
    step, tokens = CPUStep(make_model()), draw(2, 3)
    state = step(tokens[:, 0]).state
    first = step(tokens[:, 1], state)
    step(tokens[:, 2], first.state)
    assert_equal_outputs(step(tokens[:, 1], state), first)


def test_rows_of_a_state_may_be_gathered_and_forked(make_model, draw):
    step, tokens = CPUStep(make_model()), draw(3, 2)
    state = step(tokens[:, 0]).state
    whole = step(tokens[:, 1], state)
    index = torch.tensor([2, 0])
    assert torch.equal(step(tokens[index, 1], state[index]).logits, whole.logits[index])
    forked = ModelState(
        tuple(
            MixerState(layer.conv[:1].expand(3, -1, -1), layer.ssm[:1].expand(3, -1, -1))
            for layer in state.layers
        )
    )
    logits = step(tokens[:1, 1].expand(3), forked).logits
    assert torch.equal(logits, whole.logits[:1].expand(3, -1))


def test_a_rounded_copy_is_made_once_and_lives_as_long_as_its_model(make_model, monkeypatch):
    made = []
    pack = step_module.PackedModel
    monkeypatch.setattr(step_module, "PackedModel", lambda *a: made.append(a[1:]) or pack(*a))
    model = make_model()
    for weights in ("int8", "int8", "bf16", "int8"):
        CPUStep(model, weights)
    assert made == [("int8",), ("bf16",)]
    assert model in step_module._copies
    gone = weakref.ref(model)
    made.clear()
    del model
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("change", [lambda w: w + 1, lambda w: w.flip(0), lambda w: w.flip(-1)])
@pytest.mark.parametrize("name", ["norm_f.weight", "layers.0.mixer.out_proj.weight"])
def test_a_new_step_sees_what_was_written_past_the_count_of_changes(
    make_model, draw, name, change
):
    model, tokens = make_model(), draw(1, 1)[:, 0]
    parameter = model.backbone.get_parameter(name)
    parameter.data[:] = torch.randn_like(parameter)
    before = CPUStep(model, "int8")(tokens).logits
    parameter.data[:] = change(parameter.data)
    after = CPUStep(model, "int8")(tokens).logits
    assert torch.equal(after, CPUStep(copy.deepcopy(model), "int8")(tokens).logits)
    assert not torch.equal(after, before)


def test_no_sequences_are_no_work(make_model, draw):
    logits, state = CPUStep(make_model())(draw(0, 1)[:, 0])
    assert logits.shape == (0, 264)
    assert len(state) == 0
    logits, states = CPUStep(make_model()).read(draw(3, 0))
    assert (logits.shape, len(states)) == ((3, 0, 264), 0)


def test_tokens_may_be_int32(make_model, draw):
    step, tokens = CPUStep(make_model()), draw(2, 1)[:, 0]
    assert_equal_outputs(step(tokens.int()), step(tokens))


# ---------------------------------------------------------------- what is not a number


@pytest.mark.parametrize("weights", [None, "bf16", "int8"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_no_numbers_show(library, make_model, draw, weights, value):
    model = make_model()
    model.backbone.layers[0].mixer.x_proj.weight[3, 5] = value
    assert CPUStep(model, weights)(draw(2, 1)[:, 0]).logits.isnan().all()


@pytest.mark.parametrize("weights", [None, "bf16", "int8"])
def test_a_state_that_is_no_number_spoils_its_own_row_alone(library, make_model, draw, weights):
    step, tokens = CPUStep(make_model(), weights), draw(3, 2)
    state = step(tokens[:, 0]).state
    wanted = step(tokens[:, 1], state)
    spoilt = state.layers[0].ssm.clone()
    spoilt[1] = torch.nan
    layers = (MixerState(state.layers[0].conv, spoilt), *state.layers[1:])
    logits = step(tokens[:, 1], ModelState(layers)).logits
    assert logits[1].isnan().all()
    assert torch.equal(logits[[0, 2]], wanted.logits[[0, 2]])


@pytest.mark.parametrize("weights", [None, "int8"])
def test_vectors_of_zeros_stay_zeros(library, make_model, draw, weights):
    model = make_model()
    model.backbone.norm_f.weight.zero_()
    assert not CPUStep(model, weights)(draw(2, 1)[:, 0]).logits.any()


# ---------------------------------------------------------------- parameters that change


def _write_to_a_parameter(model):
    model.lm_head.weight.mul_(2)


def _load_others(model):
    model.load_state_dict({name: t * 1.5 for name, t in model.state_dict().items()})


def _assign_a_parameter(model):
    mixer = model.backbone.layers[1].mixer
    mixer.D = nn.Parameter(mixer.D * 1.5, requires_grad=False)


def _give_other_data(model):
    parameter = model.backbone.layers[0].mixer.dt_proj.weight
    parameter.data = parameter.data * 2


def _exchange_a_module(model):
    model.backbone.layers[0].norm = RMSNorm(24, eps=1e-1).requires_grad_(False)


@pytest.mark.parametrize("weights", [None, "bf16", "int8"])
@pytest.mark.parametrize(
    "change",
    [
        _write_to_a_parameter,
        _load_others,
        _assign_a_parameter,
        _give_other_data,
        _exchange_a_module,
    ],
)
def test_a_change_of_parameters_is_followed(make_model, draw, change, weights):
    model, tokens = make_model(), draw(2, 1)[:, 0]
    step = CPUStep(model, weights)
    before = step(tokens).logits
    change(model)
    after = step(tokens).logits
    assert torch.equal(after, CPUStep(model, weights)(tokens).logits)
    assert not torch.equal(after, before)


def test_a_model_that_became_another_is_refused(make_model, draw):
    model = make_model()
    step = CPUStep(model)
    model.backbone.layers[0].mixer.in_proj = nn.Sequential(nn.Linear(24, 96))
    with pytest.raises(RuntimeError, match="in_proj is a Sequential"):
        step(draw(2, 1)[:, 0])


def test_a_token_reads_the_weights_that_were_asked_for(make_model):
    # of a size at which all but the matrices is little
    model = make_model(d_model=256)
    whole, half, quarter = (CPUStep(model, w).nbytes for w in (None, "bf16", "int8"))
    assert 0.5 < half / whole < 0.54
    assert 0.25 < quarter / whole < 0.31


# ---------------------------------------------------------------- refusals


def _adapter(model):
    model.backbone.layers[0].mixer.out_proj = nn.Linear(48, 24)
    return model


def _hooked(model):
    model.backbone.layers[1].register_forward_hook(lambda *_: None)
    return model


def _patched(model):
    model.backbone.forward = model.backbone.forward
    return model


def _mixed(model):
    model.lm_head.half()
    return model


def _elsewhere(model):
    return model.to("meta")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_adapter, "backbone.layers.0.mixer.out_proj is a Linear"),
        (_hooked, "backbone.layers.1 has hooks or a forward of its own"),
        (_patched, "backbone has hooks or a forward of its own"),
        (_mixed, "the model is in float16, float32, not in one of"),
        (_elsewhere, "the model is on meta, not on a CPU"),
        (lambda model: model.double(), "the model is in float64, not in one of"),
        (lambda _: nn.Linear(2, 2), "the model is a Linear, not a MambaLM"),
        (
            lambda model: MambaLM(model.config, backend="reference"),
            "the model names another backend, 'reference'",
        ),
    ],
)
def test_what_the_step_cannot_stand_for_is_refused(make_model, change, reason):
    model = change(make_model())
    assert reason in refusal(model)
    with pytest.raises(RuntimeError, match=r"^CPUStep: it cannot stand for this model: "):
        CPUStep(model)


def test_parameters_whose_changes_nobody_counts_are_refused():
    with torch.inference_mode():
        model = MambaLM(MambaConfig(d_model=16, n_layer=1, vocab_size=32))
    assert "inference mode" in refusal(model)


def test_a_machine_without_the_library_is_told(monkeypatch, make_model):
    model = make_model()
    monkeypatch.setattr(_native, "unavailable", lambda: "the CPU library was not built: why")
    with pytest.raises(RuntimeError, match="the CPU library was not built: why"):
        CPUStep(model)


def test_a_lack_of_memory_is_one_sentence(monkeypatch, make_model, draw):
    step = CPUStep(make_model())
    monkeypatch.setattr(step._library, "_step", lambda *_: False)
    with pytest.raises(RuntimeError, match=r"^CPUStep: there is not enough memory"):
        step(draw(1, 1)[:, 0])
    assert step_library.step_library() is step._library


def test_gradients_are_refused(make_model, draw):
    model, tokens = make_model(), draw(2, 1)[:, 0]
    step = CPUStep(model)
    state = step(tokens).state
    model.backbone.norm_f.requires_grad_()
    with pytest.raises(RuntimeError, match=r"^CPUStep: it passes no gradients on"):
        step(tokens)
    with torch.no_grad():
        step(tokens)
    model.requires_grad_(False)
    layers = (MixerState(state.layers[0].conv, state.layers[0].ssm.clone().requires_grad_()),)
    with pytest.raises(RuntimeError, match=r"^CPUStep: it passes no gradients on"):
        step(tokens, ModelState(layers + state.layers[1:]))


@pytest.mark.refuses
@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([1, 2], "tokens must be a tensor, got list"),
        (torch.ones(2, 1, dtype=torch.int64), r"shape \(b,\), got int64 of shape \(2, 1\)"),
        (torch.ones(2), "int64 or int32 of shape"),
        (torch.tensor([3, 257]), r"tokens must be in \[0, 257\), got 257"),
        (torch.tensor([-1]), r"tokens must be in \[0, 257\), got -1"),
        (torch.ones(2, dtype=torch.int64, device="meta"), "tokens must be on cpu"),
    ],
)
def test_wrong_tokens_are_one_sentence(make_model, tokens, message):
    with pytest.raises(ValueError, match=f"^CPUStep: .*{message}"):
        CPUStep(make_model())(tokens)


@pytest.mark.refuses
def test_tokens_to_read_at_once_are_a_matrix(make_model, draw):
    with pytest.raises(ValueError, match=r"shape \(b, l\), got int64 of shape \(2,\)"):
        CPUStep(make_model()).read(draw(2, 1)[:, 0])


@pytest.mark.refuses
def test_wrong_states_are_one_sentence(make_model, draw):
    model, tokens = make_model(), draw(2, 1)[:, 0]
    step = CPUStep(model)
    state = step(tokens).state
    for wrong, message in (
        ("state", "state must be a ModelState or None, got str"),
        (ModelState(state.layers[:1]), "state must have 2 layers, got 1"),
        (state[:1], r"state must have conv of \(2, 48, 3\) in layer 0, got \(1, 48, 3\)"),
        (make_model(d_state=3)(tokens[:, None]).state, r"state must have ssm of \(2, 48, 16\)"),
        (state.to(device="meta"), "state must be on cpu, got meta"),
    ):
        with pytest.raises(ValueError, match=f"^CPUStep: {message}"):
            step(tokens, wrong)
    with pytest.raises(ValueError, match=r"state must have conv of \(1, 48, 3\)"):
        step(tokens[:1], state)


@pytest.mark.refuses
def test_unknown_weights_are_one_sentence(make_model):
    with pytest.raises(ValueError, match=r"^CPUStep: weights must be None or one of bf16"):
        CPUStep(make_model(), "int4")
