"""One graph for every length: torch.compile and torch.export take model and state."""

import pytest
import torch
from torch.testing import assert_close

from mambakit import MambaConfig, MambaLM

pytestmark = pytest.mark.compiles

CONFIG = MambaConfig(d_model=8, n_layer=2, vocab_size=20, d_state=4)


@pytest.fixture
def model():
    torch.compiler.reset()
    torch.manual_seed(0)
    return MambaLM(CONFIG)


def draw(l, b=2):
    source = torch.Generator().manual_seed(l)
    tokens = torch.randint(20, (b, l), generator=source, device="cpu")
    return tokens.to(torch.get_default_device())


class Counter:
    """A compiler that counts its graphs and runs them as they are."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph


def test_one_graph_serves_every_length(model):
    count = Counter()
    compiled = torch.compile(model, fullgraph=True, backend=count)
    for l in (9, 17, 64, 130):
        tokens = draw(l)
        torch._dynamo.mark_dynamic(tokens, 1)
        assert_close(compiled(tokens).logits, model(tokens).logits)
    assert count.graphs == 1


def test_one_graph_continues_from_every_state(model):
    count = Counter()
    compiled = torch.compile(model, fullgraph=True, backend=count)
    state = model(draw(5)).state.detach()
    for l in (9, 17, 64):
        tokens = draw(l)
        torch._dynamo.mark_dynamic(tokens, 1)
        output, expected = compiled(tokens, state), model(tokens, state)
        assert_close(output.logits, expected.logits)
        assert_close(tuple(output.state.layers[1]), tuple(expected.state.layers[1]))
        state = output.state.detach()
    assert count.graphs == 1


def test_gradients_of_the_compiled_model_are_the_models(model):
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    tokens = draw(12)
    parameters = list(model.parameters())
    expected = torch.autograd.grad(model(tokens).logits.square().sum(), parameters)
    gradients = torch.autograd.grad(compiled(tokens).logits.square().sum(), parameters)
    for gradient, wanted in zip(gradients, expected, strict=True):
        assert_close(gradient, wanted)


def test_it_exports_with_state_and_any_length(model):
    tokens, state = draw(9), model(draw(5)).state.detach()
    dynamic = torch.export.ShapesCollection()
    dynamic[tokens] = {1: torch.export.Dim("l", min=2, max=4096)}
    program = torch.export.export(
        model.requires_grad_(False), (tokens, state), dynamic_shapes=dynamic
    )
    for l in (9, 33):
        output, expected = program.module()(draw(l), state), model(draw(l), state)
        assert_close(output.logits, expected.logits)
        assert_close(tuple(output.state.layers[1]), tuple(expected.state.layers[1]))
