"""Sums left open between blocks change no bit, and nobody who looks at a block misses them."""

import weakref

import pytest
import torch
from torch import nn

from mambakit import MambaConfig
from mambakit.models.backbone import Backbone
from mambakit.modules import Block, RMSNorm, norm as norm_module


def make(dtype=None, **config):
    torch.manual_seed(0)
    sizes = {"d_model": 8, "n_layer": 3, "vocab_size": 20, "d_state": 4}
    backbone = Backbone(MambaConfig(**sizes | config), dtype=dtype)
    nn.init.normal_(backbone.embedding.weight)
    return backbone, torch.randint(20, (2, 7))


def closed(backbone, tokens, state=None, cu_seqlens=None):
    """The backbone, block by block."""
    x, after = backbone.embedding(tokens).to(torch.float32), []
    for i, block in enumerate(backbone.layers):
        before = None if state is None else state.layers[i]
        x, layer = block(x, before, cu_seqlens=cu_seqlens)
        after.append(layer)
    return backbone.norm_f(x), tuple(after)


def run(backbone, tokens, state=None, cu_seqlens=None):
    x, state = backbone(tokens, state, cu_seqlens=cu_seqlens)
    return x, state.layers


def assert_same(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_open_sums_change_no_bit_of_values_and_gradients(dtype):
    backbone, tokens = make(dtype)
    outputs = closed(backbone, tokens), run(backbone, tokens)
    assert_same(outputs[1], outputs[0])
    dy, parameters = torch.randn(2, 7, 8).to(dtype), list(backbone.parameters())
    gradients = [torch.autograd.grad(output, parameters, dy) for output, _ in outputs]
    assert_same(gradients[1], gradients[0])


def test_states_and_packs_go_through():
    backbone, tokens = make()
    _, state = backbone(tokens)
    pack = torch.tensor([0, 4, 7], device="cpu")
    given = tokens[:1], state, pack
    assert_same(run(backbone, *given), closed(backbone, *given))
    last, _ = backbone(tokens[:1], state, cu_seqlens=pack, last_only=True)
    assert_same(last[:, 0], closed(backbone, *given)[0][0, [3, 6]])
    last, _ = backbone(tokens, state, last_only=True)
    assert_same(last, closed(backbone, tokens, state)[0][:, -1:])


def test_a_sum_is_taken_with_the_norm_after_it(monkeypatch):
    seen = []

    def after_sum(norm, x, y):
        seen.append(norm)
        return x + y, norm(x + y)

    monkeypatch.setattr(RMSNorm, "after_sum", after_sum)
    backbone, tokens = make()
    run(backbone, tokens)
    assert seen == [backbone.layers[1].norm, backbone.layers[2].norm, backbone.norm_f]


@torch.no_grad()
def test_what_was_added_up_makes_room_for_the_mixer():
    """Before its sum the stream is two tensors, and at the mixer there is neither."""
    backbone, tokens = make()
    parts, alive = [], []
    plain = RMSNorm.after_sum

    def after_sum(norm, x, y):
        parts.extend((weakref.ref(x), weakref.ref(y)))
        return plain(norm, x, y)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RMSNorm, "after_sum", after_sum)
        for block in backbone.layers:
            block.mixer.register_forward_pre_hook(
                lambda *_: alive.append(sum(part() is not None for part in parts))
            )
        run(backbone, tokens)
    assert len(parts) == 6
    assert alive == [0, 0, 0]


class OtherBlock(Block):
    """Adds twice."""

    def forward(self, x, state=None, **keywords):
        y, state = super().forward(x, state, **keywords)
        return 2 * y, state


def _double(block):
    plain = block.forward

    def forward(*arguments, **keywords):
        y, state = plain(*arguments, **keywords)
        return 2 * y, state

    block.forward = forward


@pytest.mark.parametrize(
    "change",
    [
        lambda backbone: backbone.layers[1].register_forward_hook(
            lambda module, arguments, output: (2 * output[0], output[1])
        ),
        lambda backbone: backbone.layers[1].register_forward_hook(
            lambda module, arguments, output: [output[0].mul_(2), None][1]
        ),
        lambda backbone: backbone.layers[1].register_forward_pre_hook(
            lambda module, arguments: (2 * arguments[0], *arguments[1:])
        ),
        lambda backbone: backbone.layers[1].norm.register_forward_hook(
            lambda module, arguments, output: 2 * output
        ),
        lambda backbone: backbone.layers[1].mixer.register_forward_hook(
            lambda module, arguments, output: (2 * output[0], output[1])
        ),
        lambda backbone: backbone.norm_f.register_forward_pre_hook(
            lambda module, arguments: (arguments[0] + 1,)
        ),
        lambda backbone: _double(backbone.layers[1]),
        lambda backbone: backbone.layers.__setitem__(
            1, OtherBlock(backbone.layers[1].mixer, 8)
        ),
    ],
)
def test_who_changes_a_block_is_heeded(change):
    backbone, tokens = make()
    plain, _ = run(backbone, tokens)
    change(backbone)
    with torch.no_grad():
        wanted, found = closed(backbone, tokens), run(backbone, tokens)
    assert_same(found, wanted)
    assert not torch.equal(wanted[0], plain)


def test_who_looks_at_blocks_sees_the_stream():
    backbone, tokens = make()
    seen = []
    for block in backbone.layers:
        block.register_forward_hook(lambda module, arguments, output: seen.append(output[0]))
    run(backbone, tokens)
    found = list(seen)
    closed(backbone, tokens)
    assert_same(found, seen[len(found) :])


def test_who_looks_at_all_modules_sees_the_blocks():
    backbone, tokens = make()
    seen = []
    hook = nn.modules.module.register_module_forward_hook(
        lambda module, arguments, output: seen.append(module)
    )
    try:
        run(backbone, tokens)
    finally:
        hook.remove()
    assert [m for m in seen if isinstance(m, Block)] == list(backbone.layers)
    assert backbone.norm_f in seen


@pytest.mark.compiles
@torch.no_grad()
def test_a_compiled_block_is_called_whole():
    torch.compiler.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    backbone, tokens = make()
    wanted = closed(backbone, tokens)
    for block in backbone.layers:
        block.compile(fullgraph=True, backend=count)
    torch.testing.assert_close(run(backbone, tokens), wanted)
    assert len(graphs) == 1


def test_where_nobody_asks_for_gradients_a_gpu_passes_memory_once(device, monkeypatch):
    """On a processor the operators are stood in for, to see when they are called."""
    calls = []

    def normalise(x, gain, eps):
        return torch.nn.functional.rms_norm(x, gain.shape, gain, eps)

    stand_ins = {
        "rms_norm": normalise,
        "add_rms_norm": lambda x, y, gain, eps: (x + y, normalise(x + y, gain, eps)),
    }
    for name, stand_in in stand_ins.items():
        own = getattr(norm_module, name) if device.type == "cuda" else stand_in

        def called(*arguments, name=name, own=own):
            calls.append(name)
            return own(*arguments)

        monkeypatch.setattr(norm_module, name, called)
    if device.type == "cpu":
        monkeypatch.setattr(norm_module, "serves", lambda *_: not torch.is_grad_enabled())
    backbone, tokens = make()
    wanted = run(backbone, tokens)
    assert not calls
    with torch.no_grad():
        torch.testing.assert_close(run(backbone, tokens), wanted, rtol=1e-5, atol=1e-5)
    assert calls == ["rms_norm", *["add_rms_norm"] * 3]


def test_who_changes_what_all_blocks_do_is_heeded(monkeypatch):
    backbone, tokens = make()
    ran, forward = [], Block.forward

    def patched(block, *args, **kwargs):
        ran.append(block)
        return forward(block, *args, **kwargs)

    monkeypatch.setattr(Block, "forward", patched)
    assert_same(run(backbone, tokens), closed(backbone, tokens))
    assert len(ran) == 2 * len(backbone.layers)


def test_an_embedding_in_anothers_place_needs_no_weight():
    backbone, tokens = make()
    expected = run(backbone, tokens)

    class Wrapper(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, tokens):
            return self.inner(tokens)

    backbone.embedding = Wrapper(backbone.embedding)
    assert_same(run(backbone, tokens), expected)
