"""A run compiles where it gains by it and can, and says why it does not."""

import copy
import importlib.util
import shutil
from contextlib import nullcontext

import pytest
import torch

from mambakit import MambaConfig, MambaLM
from mambakit.training.compilation import Compilation, compile_blocks, resolve_compilation
from mambakit.training.gradient import add_gradients

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def able(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/" + name)


def test_unasked_a_gpu_compiles_and_a_cpu_does_not(able):
    assert resolve_compilation(None, GPU) == Compilation(True)
    assert resolve_compilation(None, CPU) == Compilation(False)


@pytest.mark.parametrize("asked", [True, False])
@pytest.mark.parametrize("device", [CPU, GPU])
def test_asked_it_is_as_asked(able, asked, device):
    assert resolve_compilation(asked, device) == Compilation(asked)


@pytest.mark.parametrize(
    ("module", "name", "clause"),
    [
        (importlib.util, "find_spec", "Triton is not installed"),
        (shutil, "which", "Triton needs a C compiler, and there is none"),
    ],
)
def test_what_is_missing_is_named(able, monkeypatch, module, name, clause):
    monkeypatch.setattr(module, name, lambda name: None)
    assert resolve_compilation(None, GPU) == Compilation(False, clause)
    assert resolve_compilation(False, GPU) == Compilation(False)
    with pytest.raises(RuntimeError, match=f"training.compile cannot be used: {clause}"):
        resolve_compilation(True, GPU)


@pytest.mark.compiles
def test_all_blocks_share_one_graph(monkeypatch):
    torch.compiler.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    model = MambaLM(MambaConfig(d_model=8, n_layer=5, vocab_size=16, d_state=4))
    names, tokens = list(model.state_dict()), torch.randint(16, (2, 6))
    expected = model(tokens).logits
    compile_blocks(model, backend=count)
    torch.testing.assert_close(model(tokens).logits, expected)
    assert len(graphs) == 1
    assert list(model.state_dict()) == names


@pytest.mark.compiles
def test_models_of_many_sizes_may_follow_each_other():
    torch.compiler.reset()
    tokens = torch.randint(16, (2, 6))
    for width in range(4, 16):
        model = MambaLM(MambaConfig(d_model=width, n_layer=2, vocab_size=16, d_state=4))
        expected = model(tokens).logits
        compile_blocks(model, backend="eager")
        torch.testing.assert_close(model(tokens).logits, expected)


@pytest.mark.compiles
@pytest.mark.parametrize(("goes_on", "most"), [(False, 1), (True, 3)])
def test_packs_of_any_number_of_documents_share_their_graphs(goes_on, most):
    """Of those with states before them, packs of one sequence have a graph of their own."""
    torch.compiler.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    model = MambaLM(MambaConfig(d_model=8, n_layer=3, vocab_size=16, d_state=4))
    plain = copy.deepcopy(model)
    compile_blocks(model, backend=count)
    states = [None, None]
    for share in (0.0, 0.3, 0.7, 0.0, 0.5, 0.2):
        tokens, targets = torch.randint(16, (2, 1, 9)).unbind()
        starts = torch.rand(1, 9, device="cpu") < share
        starts[:, 0] = False
        losses = []
        for i, each in enumerate((model, plain)):
            loss, states[i] = add_gradients(
                each, tokens, targets, states[i] if goes_on else None, starts=starts,
                autocast=nullcontext, compiled=each is model,
            )  # fmt: skip
            losses.append(loss)
        torch.testing.assert_close(*losses)
    for parameter, expected in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad)
    assert 1 <= len(graphs) <= most
