"""Rounded weights: how they are rounded, and how little a trained model loses."""

import math

import pytest
import torch
import torch.nn.functional as F

from mambakit import MambaConfig, MambaLM
from mambakit.generation.cpu_step import rounded
from mambakit.ops import _native

WHY_NOT = _native.unavailable()

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT)),
]

MATRICES = ("in_proj", "x_proj", "dt_proj", "out_proj")


def test_int8_is_the_nearest_of_255_numbers_in_each_row(library, make_model):
    model = make_model(d_model=40)
    result = rounded(model, "int8")
    for block, source in zip(result.backbone.layers, model.backbone.layers, strict=True):
        for name in MATRICES:
            weight = getattr(block.mixer, name).weight
            exact = getattr(source.mixer, name).weight
            scale = exact.abs().amax(dim=1, keepdim=True) / 127
            assert ((weight - exact).abs() <= 0.50001 * scale).all()
            whole = weight / scale
            assert (whole - whole.round()).abs().max() < 1e-4
            assert whole.abs().max() < 127.001


def test_bf16_rounds_as_torch_does(make_model):
    model = make_model()
    result = rounded(model, "bf16")
    assert torch.equal(result.lm_head.weight, model.lm_head.weight.bfloat16().float())


@pytest.mark.parametrize("weights", ["bf16", "int8"])
def test_all_but_the_matrices_stays_as_it_is(make_model, weights):
    model = make_model(torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = rounded(model, weights)
    assert result.config.tie_embeddings is False
    for name, tensor in result.state_dict().items():
        if not any(name.endswith(f"{m}.weight") for m in (*MATRICES, "lm_head")):
            assert torch.equal(tensor, before[name].float()), name
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_rows_of_zeros_stay_zeros(library, make_model):
    model = make_model()
    model.lm_head.weight[5] = 0
    weight = rounded(model, "int8").lm_head.weight
    assert not weight[5].any()
    assert weight[4].any()


@pytest.fixture(scope="module")
def trained():
    """A model that has learnt a language, and a text in it.

    Each letter is drawn by the two before it, all but always one of three.
    """
    chance = torch.Generator().manual_seed(1)
    letters, streams, length = 12, 32, 96
    table = (3 * torch.randn(letters, letters, letters, generator=chance)).softmax(-1)

    def text(b, l):
        drawn = torch.zeros(b, l, dtype=torch.int64)
        for t in range(2, l):
            odds = table[drawn[:, t - 2], drawn[:, t - 1]]
            drawn[:, t] = torch.multinomial(odds, 1, generator=chance)[:, 0]
        return drawn

    torch.manual_seed(1)
    model = MambaLM(MambaConfig(d_model=32, n_layer=2, vocab_size=letters))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        tokens = text(streams, length)
        optimizer.zero_grad()
        loss(model, tokens).backward()
        optimizer.step()
    return model.requires_grad_(False), text(64, 128)


def loss(model, tokens):
    logits = model(tokens[:, :-1]).logits[..., : model.config.vocab_size]
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


@pytest.mark.parametrize("weights", ["bf16", "int8"])
def test_a_trained_models_perplexity_stays_within_a_percent(trained, weights):
    model, text = trained
    exact = math.exp(loss(model, text))
    assert exact < 6  # of 12: it has learnt
    assert math.exp(loss(rounded(model, weights), text)) < 1.01 * exact
