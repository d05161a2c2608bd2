"""Laws of the door: what a module cannot take gets one sentence, in the module's own name."""

import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from mambakit.modules import Block, Mamba, MixerState, RMSNorm

M = 16
KINDS = ["Mamba", "Block"]


def make(kind, **settings):
    mixer = Mamba(M, d_state=4, **settings)
    return mixer if kind == "Mamba" else Block(mixer, M, **settings)


def zeros(*shape, **settings):
    return torch.zeros(*shape, device="cpu", **settings)


def part(size, b=2, **settings):
    return zeros(b, 2 * M, size, **settings)


@pytest.mark.refuses
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("x", "message"),
    [
        (zeros(2, 3, 15), "x must have shape (b, l, 16), got (2, 3, 15)"),
        (zeros(3, 16), "x must have shape (b, l, 16), got (3, 16)"),
        (zeros(1, 2, 3, 16), "x must have shape (b, l, 16), got (1, 2, 3, 16)"),
        (zeros(()), "x must have shape (b, l, 16), got ()"),
        (
            zeros(2, 3, 16, dtype=torch.int64),
            "x must be float32, bfloat16, float16 or float64, got int64",
        ),
        (
            zeros(2, 3, 16, dtype=torch.complex64),
            "x must be float32, bfloat16, float16 or float64, got complex64",
        ),
        (zeros(2, 3, 16).to_sparse(), "x must be a dense tensor, got layout sparse_coo"),
        (zeros(2, 3, 16).to("meta"), "x must be on cpu like the parameters, got meta"),
        ([[[0.0] * 16]], "x must be a tensor, got list"),
        (None, "x must be a tensor, got None"),
    ],
)
def test_what_is_no_stream_of_its_width_is_refused(kind, x, message):
    with pytest.raises(ValueError, match=f"^{kind}: {re.escape(message)}$"):
        make(kind)(x)


@pytest.mark.refuses
@pytest.mark.parametrize(
    ("x", "message"),
    [
        (zeros(2, 3, 15), "x must have shape (..., 16), got (2, 3, 15)"),
        (zeros(2, 16, 1), "x must have shape (..., 16), got (2, 16, 1)"),
        (zeros(()), "x must have shape (..., 16), got ()"),
        (
            zeros(16, dtype=torch.int64),
            "x must be float32, bfloat16, float16 or float64, got int64",
        ),
        (zeros(3, 16).to_sparse(), "x must be a dense tensor, got layout sparse_coo"),
        (zeros(3, 16).to("meta"), "x must be on cpu like the parameters, got meta"),
        ([0.0] * 16, "x must be a tensor, got list"),
        (None, "x must be a tensor, got None"),
    ],
)
def test_a_norm_refuses_what_are_no_vectors_of_its_width(x, message):
    with pytest.raises(ValueError, match=f"^RMSNorm: {re.escape(message)}$"):
        RMSNorm(M)(x)


@pytest.mark.refuses
@pytest.mark.parametrize(
    ("own", "given", "message"),
    [
        (torch.float32, torch.bfloat16, "float32 like the parameters, got bfloat16 without a"),
        (torch.bfloat16, torch.float32, "bfloat16 like the parameters, got float32 without a"),
        (torch.float32, torch.float64, "float32 like the parameters, got float64"),
    ],
)
def test_another_dtype_than_that_of_the_projections_is_refused(own, given, message):
    with pytest.raises(ValueError, match=rf"^Mamba: x must be {message}[^\n]*$"):
        make("Mamba", dtype=own)(zeros(2, 3, M, dtype=given))


@pytest.mark.refuses
@pytest.mark.parametrize(
    ("own", "given"), [(torch.float32, torch.float64), (torch.float64, torch.float32)]
)
def test_autocast_converts_no_float64(own, given):
    mixer = make("Mamba", dtype=own)
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(ValueError, match=r"^Mamba: x must be float\d\d like .*, got float\d\d$"),
    ):
        mixer(zeros(2, 3, M, dtype=given))


@pytest.mark.parametrize(
    ("own", "given"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)]
)
def test_what_converts_is_left_to_it(own, given, device):
    x = torch.randn(2, 3, M, dtype=given)
    with torch.autocast(device.type, torch.bfloat16):
        assert make("Mamba", dtype=own)(x)[0].dtype == torch.bfloat16
    # the block's norm returns what the mixer's parameters are
    assert make("Block", dtype=own)(x)[0].shape == x.shape


def convert(module, arguments):
    return tuple(argument.float() for argument in arguments)


@pytest.mark.parametrize("how", ["hook", "adapter", "forward"])
def test_a_projection_that_is_not_as_it_was_made_may_convert_by_itself(how):
    mixer, x = make("Mamba"), torch.randn(2, 3, M, dtype=torch.bfloat16)
    expected = mixer(x.float())[0]
    own = mixer.in_proj
    if how == "hook":
        own.register_forward_pre_hook(convert)
    elif how == "adapter":
        mixer.in_proj = nn.Sequential(nn.Identity(), own)
        mixer.in_proj.register_forward_pre_hook(convert)
    else:
        forward = own.forward
        own.forward = lambda input: forward(input.float())
    assert_close(mixer(x)[0], expected)


@pytest.mark.refuses
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("state", "message"),
    [
        (5, "state must be a MixerState or None, got int"),
        ((part(3),), "state must be a MixerState or None, got tuple"),
        (MixerState(part(2), part(4)), "conv of shape (2, 32, 3), got (2, 32, 2)"),
        (MixerState(part(3), part(5)), "ssm of shape (2, 32, 4), got (2, 32, 5)"),
        (MixerState(part(3, b=3), part(4)), "conv of shape (2, 32, 3), got (3, 32, 3)"),
        (MixerState(part(3), part(4)[0]), "ssm of shape (2, 32, 4), got (32, 4)"),
        (MixerState(None, part(4)), "state.conv must be a tensor, got None"),
        (
            MixerState(part(3), part(4, dtype=torch.int32)),
            "state.ssm must be float32, bfloat16, float16 or float64, got int32",
        ),
        (
            MixerState(part(3), part(4).to("meta")),
            "state.ssm must be on cpu like the others, got meta",
        ),
        (
            MixerState(part(3).to_sparse(), part(4)),
            "state.conv must be a dense tensor, got layout sparse_coo",
        ),
    ],
)
def test_what_is_no_state_of_its_sizes_is_refused(kind, state, message):
    with pytest.raises(ValueError, match=rf"^Mamba: [a-z ]*{re.escape(message)}$"):
        make(kind)(zeros(2, 3, M), state)


@pytest.mark.compiles
def test_a_compiled_norm_refuses_in_the_same_words():
    torch.compiler.reset()
    compiled = torch.compile(RMSNorm(M), backend="eager")
    compiled(torch.randn(2, 5, M))
    with pytest.raises(ValueError, match=r"^RMSNorm: x must have shape \(..., 16\), got \(2,"):
        compiled(torch.randn(2, 5, M + 1))


@pytest.mark.refuses
@pytest.mark.parametrize("m", [16.0, 0, None, "16"])
def test_a_block_has_a_whole_width(m):
    message = f"Block: m must be a whole number of at least 1, got {m!r}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Block(make("Mamba"), m)


@pytest.mark.compiles
@pytest.mark.parametrize("kind", KINDS)
def test_the_door_is_part_of_one_graph_for_every_length(kind):
    torch.compiler.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    module, state = make(kind), None
    compiled = torch.compile(module, fullgraph=True, backend=count)
    for l in (5, 9, 64, 130):
        x = torch.randn(2, l, M)
        torch._dynamo.mark_dynamic(x, 1)
        y, after = compiled(x, state)
        assert_close(y, module(x, state)[0])
        state = after.detach()
    assert len(graphs) == 2  # one that begins and one that goes on


@pytest.mark.compiles
@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_module_refuses_in_the_same_words(kind):
    torch.compiler.reset()
    compiled = torch.compile(make(kind), backend="eager")
    compiled(torch.randn(2, 5, M))
    with pytest.raises(
        ValueError, match=rf"^{kind}: x must have shape \(b, l, 16\), got \(2, 5"
    ):
        compiled(torch.randn(2, 5, M + 1))


@pytest.mark.refuses  # a pair is no MixerState to who checks annotations
def test_a_state_may_come_as_a_plain_pair():
    mixer, x = Mamba(6, 4), torch.randn(1, 5, 6)
    state = mixer(x)[1]
    assert_close(mixer(x, tuple(state))[0], mixer(x, state)[0])


@pytest.mark.refuses
def test_whole_numbers_of_numpy_are_sizes():
    assert Mamba(np.int64(6), expand=np.int32(3)).d_inner == 18
