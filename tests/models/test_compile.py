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


def test_one_graph_serves_every_pack_of_as_many_sequences(model):
    count = Counter()
    compiled = torch.compile(model, fullgraph=True, backend=count)
    for cuts in ([0, 4, 5, 12], [0, 1, 9, 12]):
        pack = torch.tensor(cuts, device="cpu")
        output = compiled(draw(12, b=1), cu_seqlens=pack)
        expected = model(draw(12, b=1), cu_seqlens=pack)
        assert_close(output.logits, expected.logits)
        assert_close(tuple(output.state.layers[1]), tuple(expected.state.layers[1]))
    assert count.graphs == 1


def test_one_graph_serves_packs_of_every_length_and_number_of_sequences(model):
    count = Counter()
    compiled = torch.compile(model, fullgraph=True, backend=count)
    state = model(draw(5, b=4)).state.detach()
    for cuts in ([0, 4, 5, 12], [0, 1, 9, 15, 17], [0, 3, 40]):
        pack, tokens = torch.tensor(cuts, device="cpu"), draw(cuts[-1], b=1)
        torch._dynamo.mark_dynamic(tokens, 1)
        torch._dynamo.mark_dynamic(pack, 0)
        before = state[: len(cuts) - 1]
        for part in (part for layer in before.layers for part in layer):
            torch._dynamo.mark_dynamic(part, 0)
        output = compiled(tokens, before, cu_seqlens=pack)
        assert_close(output.logits, model(tokens, before, cu_seqlens=pack).logits)
    assert count.graphs == 1


def test_a_pack_that_does_not_rise_is_refused_by_the_compiled_model_too(model):
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with pytest.raises(ValueError, match="cu_seqlens must rise, got 4 after 5 at index 2"):
        compiled(draw(12, b=1), cu_seqlens=torch.tensor([0, 5, 4, 12], device="cpu"))


def test_gradients_of_the_compiled_model_over_a_pack_are_the_models(model):
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    tokens, parameters = draw(12, b=1), list(model.parameters())
    pack = torch.tensor([0, 4, 5, 12], device="cpu")
    expected, gradients = (
        torch.autograd.grad(call(tokens, cu_seqlens=pack).logits.square().sum(), parameters)
        for call in (model, compiled)
    )
    assert_close(gradients, expected)


def test_padding_breaks_the_graph_and_is_still_right(model):
    compiled = torch.compile(model, backend="eager")
    tokens, mask = draw(7), torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
    for lengths in (mask.flip(1).sum(1), torch.tensor([3, 7])):
        output, expected = compiled(tokens, lengths=lengths), model(tokens, lengths=lengths)
        assert_close(output.logits, expected.logits)
    output, expected = (call(tokens, attention_mask=mask) for call in (compiled, model))
    assert_close(output.logits, expected.logits)
    assert_close(tuple(output.state.layers[1]), tuple(expected.state.layers[1]))


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


def test_it_exports_with_packs_of_any_number_of_sequences(model):
    def pack(cuts):
        return torch.tensor(cuts, device="cpu")

    dynamic = torch.export.ShapesCollection()
    tokens, first = draw(12, b=1), pack([0, 4, 5, 12])
    dynamic[tokens] = {1: torch.export.Dim("l", min=2, max=4096)}
    dynamic[first] = {0: torch.export.Dim("bounds", min=3, max=4096)}
    program = torch.export.export(
        model.requires_grad_(False),
        (tokens,),
        {"cu_seqlens": first},
        dynamic_shapes=dynamic,
    )
    for cuts in ([0, 4, 5, 12], [0, 30, 33]):
        tokens = draw(cuts[-1], b=1)
        output = program.module()(tokens, cu_seqlens=pack(cuts))
        expected = model(tokens, cu_seqlens=pack(cuts))
        assert_close(output.logits, expected.logits)
        assert_close(tuple(output.state.layers[1]), tuple(expected.state.layers[1]))
