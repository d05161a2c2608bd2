"""Laws of the optimiser: what decays, and that its state comes back."""

import copy
import io

import pytest
import torch

from mambakit import MambaConfig, MambaLM
from mambakit.training import TrainingConfig
from mambakit.training.optimizer import (
    load_optimizer_tensors,
    make_optimizer,
    optimizer_tensors,
    parameter_groups,
)

CONFIG = MambaConfig(d_model=16, n_layer=1, vocab_size=32, d_state=4)
DECAYS = {f"{name}.weight" for name in ("in_proj", "conv1d", "x_proj", "dt_proj", "out_proj")}


def decaying(model, **changes):
    group, other = parameter_groups(model, TrainingConfig(steps=1, **changes))
    assert other["weight_decay"] == 0
    names = {id(p): name for name, p in model.named_parameters()}
    every = [names[id(p)] for g in (group, other) for p in g["params"]]
    assert sorted(every) == sorted(names.values())
    return {names[id(p)] for p in group["params"]}


def test_only_weight_matrices_and_kernels_decay():
    mixer = "backbone.layers.0.mixer."
    assert decaying(MambaLM(CONFIG)) == {mixer + name for name in DECAYS}


def copy_by_pickle(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, copy_by_pickle])
def test_a_copy_of_a_model_decays_as_the_model_does(duplicate):
    model = MambaLM(MambaConfig(d_model=16, n_layer=1, vocab_size=32, d_state=4, bias=True))
    twin = duplicate(model)
    assert decaying(twin) == decaying(model)
    for (name, one), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert hasattr(one, "_no_weight_decay") == hasattr(other, "_no_weight_decay"), name


def test_the_embedding_decays_on_request():
    names = decaying(MambaLM(CONFIG), decay_embedding=True)
    assert "backbone.embedding.weight" in names
    assert len(names) == len(DECAYS) + 1


def stepped(steps, seed=0):
    torch.manual_seed(seed)
    model = MambaLM(CONFIG)
    optimizer = make_optimizer(model, TrainingConfig(steps=1))
    step(model, optimizer, steps)
    return model, optimizer


def step(model, optimizer, steps):
    tokens = torch.arange(20).reshape(2, 10)
    for _ in range(steps):
        model(tokens).logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_moments_come_back_and_go_on_bit_for_bit():
    model, optimizer = stepped(3)
    other, fresh = stepped(0)
    other.load_state_dict(model.state_dict())
    moments = {k: v.clone() for k, v in optimizer_tensors(model, optimizer).items()}
    load_optimizer_tensors(other, fresh, moments)
    step(model, optimizer, 2)
    step(other, fresh, 2)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_before_the_first_step_there_are_no_moments():
    model, optimizer = stepped(0)
    assert optimizer_tensors(model, optimizer) == {}
    load_optimizer_tensors(model, optimizer, {})
    step(model, optimizer, 1)
    assert len(optimizer_tensors(model, optimizer)) == 3 * len(list(model.parameters()))


def test_moments_of_another_model_are_refused():
    model, optimizer = stepped(1)
    moments = optimizer_tensors(model, optimizer)
    name = "backbone.norm_f.weight.exp_avg"
    for wrong in ({**moments, name: torch.zeros(3)}, {**moments, "extra": torch.zeros(3)}):
        with pytest.raises(ValueError, match=r"must fit the model, got 1 tensors"):
            load_optimizer_tensors(*stepped(0), wrong)
