"""Laws of the language model."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch.testing import assert_close

from mambakit import MambaConfig, MambaLM
from mambakit.models import Backbone

SIZES = {"d_model": 12, "n_layer": 2, "vocab_size": 21, "d_state": 4, "d_conv": 3}


def make(seed=0, dtype=None, **changes):
    torch.manual_seed(seed)
    return MambaLM(MambaConfig(**SIZES | changes), dtype=dtype)


def draw(b=2, l=10, v=21, seed=1):
    source = torch.Generator().manual_seed(seed)
    tokens = torch.randint(v, (b, l), generator=source, device="cpu")
    return tokens.to(torch.get_default_device())


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("130m", 129_135_360),
        ("370m", 371_516_416),
        ("790m", 793_204_224),
        ("1.4b", 1_372_178_432),
        ("2.8b", 2_768_345_600),
    ],
)
def test_published_sizes_have_the_published_number_of_parameters(name, count):
    model = MambaLM(MambaConfig.published(name), device="meta")
    assert sum(parameter.numel() for parameter in model.parameters()) == count


def test_parameters_have_the_published_names():
    names = {name for name, _ in make(n_layer=1).named_parameters(remove_duplicate=False)}
    mixer = {
        "A_log", "D", "in_proj.weight", "conv1d.weight", "conv1d.bias", "x_proj.weight",
        "dt_proj.weight", "dt_proj.bias", "out_proj.weight",
    }  # fmt: skip
    assert names == {
        "backbone.embedding.weight", "backbone.layers.0.norm.weight", "backbone.norm_f.weight",
        "lm_head.weight", *(f"backbone.layers.0.mixer.{name}" for name in mixer),
    }  # fmt: skip


@settings(deadline=None, max_examples=15)
@given(cuts=st.lists(st.integers(0, 10), max_size=3).map(sorted))
def test_whole_is_chunked(cuts):
    model, tokens = make(dtype=torch.float64), draw()
    state, pieces = None, []
    for left, right in zip([0, *cuts], [*cuts, 10], strict=True):
        logits, state = model(tokens[:, left:right], state)
        pieces.append(logits)
    whole = model(tokens)
    assert_close(torch.cat(pieces, dim=1), whole.logits)
    for layer, expected in zip(state.layers, whole.state.layers, strict=True):
        assert_close(tuple(layer), tuple(expected))


def test_whole_is_stepped():
    model, tokens = make(dtype=torch.float64), draw()
    state, steps = None, []
    for t in range(10):
        logits, state = model(tokens[:, t : t + 1], state)
        steps.append(logits)
    assert_close(torch.cat(steps, dim=1), model(tokens).logits)


def test_gradients_flow_through_the_state():
    model, tokens = make(dtype=torch.float64), draw()

    def gradients(loss):
        return torch.autograd.grad(loss, list(model.parameters()))

    left = model(tokens[:, :4])
    cut = torch.cat([left.logits, model(tokens[:, 4:], left.state).logits], dim=1)
    for gradient, expected in zip(
        gradients(cut.square().sum()),
        gradients(model(tokens).logits.square().sum()),
        strict=True,
    ):
        assert_close(gradient, expected)


def test_the_future_does_not_touch_the_past():
    model, tokens = make(), draw()
    later = tokens.clone()
    later[:, 6:] = (later[:, 6:] + 1) % 21
    assert_close(model(later).logits[:, :6], model(tokens).logits[:, :6], rtol=0, atol=0)


def test_last_only_scores_the_last_position():
    model, tokens = make(), draw()
    whole, last = model(tokens), model(tokens, last_only=True)
    assert last.logits.shape == (2, 1, 24)
    assert_close(last.logits, whole.logits[:, -1:])
    assert_close(last.state.layers[1].ssm, whole.state.layers[1].ssm)


def test_no_tokens_give_no_logits_and_leave_the_state():
    model = make()
    state = model(draw()).state
    logits, after = model(draw(l=0), state)
    assert logits.shape == (2, 0, 24)
    for layer, expected in zip(after.layers, state.layers, strict=True):
        assert_close(tuple(layer), tuple(expected), rtol=0, atol=0)


@pytest.mark.parametrize("tie", [True, False])
def test_the_output_layer_is_the_embedding_where_tied(tie):
    model = make(tie_embeddings=tie)
    assert (model.lm_head.weight is model.backbone.embedding.weight) is tie


def test_initialisation_is_as_published():
    model = make(n_layer=4, d_model=64, vocab_size=512).requires_grad_(False)
    assert model.backbone.embedding.weight.std().item() == pytest.approx(0.02, rel=0.05)
    for block in model.backbone.layers:
        # Uniform within 1 / sqrt(fan in), as PyTorch's linear layers, over sqrt(n_layer).
        largest_in, largest_out = (
            projection.weight.abs().max().item()
            for projection in (block.mixer.in_proj, block.mixer.out_proj)
        )
        assert largest_in == pytest.approx(64**-0.5, rel=0.02)
        assert largest_out == pytest.approx(128**-0.5 / 4**0.5, rel=0.02)
    assert_close(model.backbone.norm_f.weight, torch.ones(64))
    untied = make(d_model=64, vocab_size=512, tie_embeddings=False).requires_grad_(False)
    assert untied.lm_head.weight.abs().max().item() == pytest.approx(64**-0.5, rel=0.02)


def test_the_first_loss_is_that_of_knowing_nothing():
    model = make(d_model=64, vocab_size=64)
    tokens = draw(l=64, v=64)
    logits = model(tokens[:, :-1]).logits.detach()
    loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    assert loss.item() == pytest.approx(math.log(64), abs=0.05)


@pytest.mark.parametrize("residual_in_fp32", [True, False])
def test_the_residual_stream_has_the_dtype_asked_for(residual_in_fp32):
    model = make(dtype=torch.bfloat16, residual_in_fp32=residual_in_fp32)
    streams = []
    for block in model.backbone.layers:
        block.register_forward_hook(lambda _, __, output: streams.append(output[0].dtype))
    logits = model(draw()).logits
    assert streams == [torch.float32 if residual_in_fp32 else torch.bfloat16] * 2
    assert logits.dtype == torch.bfloat16


def test_conversion_keeps_decay_and_step_in_float32_and_the_tie():
    model = make().to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        wide = name.endswith(("A_log", ".D", "dt_proj.bias"))
        assert parameter.dtype == (torch.float32 if wide else torch.bfloat16), name
    assert model.lm_head.weight is model.backbone.embedding.weight
    assert model(draw()).state.layers[0].ssm.dtype == torch.float32


def test_a_nan_in_one_sequence_does_not_reach_another():
    model, tokens = make(), draw()
    state = model(tokens).state
    state.layers[0].ssm.data[0, 0, 0] = torch.nan
    logits = model(tokens, state).logits
    assert logits[0].isnan().all()
    assert_close(logits[1:], model(tokens[1:], state[1]).logits)


@pytest.mark.refuses
@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.zeros(3, dtype=torch.int64), r"got int64 of shape \(3,\)"),
        (torch.zeros(1, 3), r"got float32 of shape \(1, 3\)"),
    ],
)
def test_tokens_of_another_kind_are_refused(tokens, message):
    with pytest.raises(
        ValueError, match=rf"tokens must be int64 or int32 of shape \(b, l\), {message}"
    ):
        make()(tokens)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_layer": 3}, "state must have 2 layers, got 3: it is another model's"),
        ({"d_model": 16}, r"state must have conv of \(b, 24, 2\) in layer 0, got \(2, 32, 2\)"),
        ({"d_conv": 4}, r"state must have conv of \(b, 24, 2\) in layer 0, got \(2, 24, 3\)"),
        ({"d_state": 5}, r"state must have ssm of \(b, 24, 4\) in layer 0, got \(2, 24, 5\)"),
    ],
)
def test_another_models_state_is_refused(changes, message):
    state = make(**changes)(draw()).state
    with pytest.raises(ValueError, match=message):
        make()(draw(), state)


def test_a_state_of_another_batch_is_refused():
    with pytest.raises(ValueError, match="as many sequences as tokens, 3, got 2"):
        make()(draw(b=3), make()(draw()).state)


@pytest.mark.refuses
def test_a_state_that_is_none_of_ours_is_refused():
    with pytest.raises(ValueError, match="state must be a ModelState or None, got tuple"):
        make()(draw(), make()(draw()).state.layers)


@pytest.mark.refuses
def test_an_unknown_backend_is_refused():
    model = MambaLM(MambaConfig(**SIZES), backend="quick")
    with pytest.raises(ValueError, match="backend must be one of"):
        model(draw())


def test_the_backbone_works_alone():
    backbone = Backbone(MambaConfig(**SIZES))
    x, state = backbone(draw())
    assert x.shape == (2, 10, 12)
    assert len(state) == 2


def test_generate_is_generations():
    model = make()
    prompt = draw(l=3)
    tokens = model.generate(prompt, max_new_tokens=2, temperature=0.0)
    assert_close(tokens[:, :3], prompt)
    assert_close(tokens[:, 3], model(prompt).logits[:, -1, :21].argmax(-1))


@pytest.mark.refuses
def test_tokens_that_are_no_tensor_are_refused():
    with pytest.raises(ValueError, match="tokens must be a tensor, got list"):
        make()([[1, 2]])
