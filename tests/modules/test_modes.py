"""The mixer and the block in every mode: packed and padded sequences are each alone."""

from functools import partial

import pytest
import torch
import torch.utils.checkpoint
from hypothesis import given, settings, strategies as st
from torch.testing import assert_close

from mambakit.modules import Block, Mamba, MixerState
from mambakit.ops._backends import why_not_fused

M, LENGTHS = 6, [4, 1, 7]


@pytest.fixture(
    scope="module",
    params=[
        (kind, backend)
        for kind in ("mixer", "selecting mixer", "block")
        for backend in ("reference", "parallel", "fused")
    ],
    ids=" ".join,
)
def module(request, chosen_device):
    kind, backend = request.param
    why_not = why_not_fused("Mamba", chosen_device) if backend == "fused" else None
    if why_not is not None:
        pytest.skip(why_not)
    torch.manual_seed(0)
    eps = 1e-6 if kind == "selecting mixer" else None
    mixer = Mamba(
        M, d_state=3, d_conv=3, bias=True, selection_norm_eps=eps, backend=backend,
        dtype=torch.float64,
    )  # fmt: skip
    torch.nn.init.normal_(mixer.in_proj.bias)
    torch.nn.init.normal_(mixer.out_proj.bias)
    return (Block(mixer, M, dtype=torch.float64) if kind == "block" else mixer).to(
        chosen_device
    )


def draw(*shape, seed=1):
    source = torch.Generator().manual_seed(seed)
    tensor = torch.randn(*shape, dtype=torch.float64, generator=source, device="cpu")
    return tensor.to(torch.get_default_device()).requires_grad_()


def draw_state(count):
    return MixerState(draw(count, 2 * M, 2, seed=2), draw(count, 2 * M, 3, seed=3))


def boundaries(lengths):
    return torch.tensor([0, *lengths], device="cpu").cumsum(0)


def place(lengths, side):
    """Say which steps of padded rows are tokens."""
    steps = torch.arange(max(lengths))
    count = torch.tensor(lengths)[:, None]
    return steps >= max(lengths) - count if side == "left" else steps < count


def alone(module, x, lengths, state):
    found = [
        module(piece[None], None if state is None else state.rows(slice(i, i + 1)))
        for i, piece in enumerate(x.split(lengths))
    ]
    y = torch.cat([y[0] for y, _ in found])
    return y, *map(torch.cat, zip(*(after for _, after in found), strict=True))


def packed(module, x, lengths, state):
    y, after = module(x[None], state, cu_seqlens=boundaries(lengths))
    return y[0], *after


def padded(side, junk, by_length=False):
    def run(module, x, lengths, state):
        real = place(lengths, side)
        rows = torch.full((*real.shape, M), junk, dtype=x.dtype)
        rows = rows.masked_scatter(real[..., None], x)
        kind = {"lengths": real.sum(1)} if by_length else {"attention_mask": real}
        y, after = module(rows, state, **kind)
        assert not y[~real].any()
        return y[real], *after

    return run


MODES = {
    "packed": packed,
    "left padded": padded("left", torch.nan),
    "right padded": padded("right", torch.inf),
    "lengths": padded("right", torch.nan, by_length=True),
}


def outcome(mode, module, x, lengths, state):
    results = mode(module, x, lengths, state)
    loss = sum((r * draw(*r.shape, seed=5).detach()).sum() for r in results)
    return results, torch.autograd.grad(loss, [x, *module.parameters(), *(state or ())])


@pytest.mark.parametrize("mode", MODES)
@settings(deadline=None, max_examples=6)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5), begun=st.booleans())
def test_every_mode_is_each_sequence_alone(module, mode, lengths, begun):
    x, state = draw(sum(lengths), M), draw_state(len(lengths)) if begun else None
    found = outcome(MODES[mode], module, x, lengths, state)
    assert_close(found, outcome(alone, module, x, lengths, state))


def test_activations_may_be_checkpointed(module):
    x, state, pack = draw(1, sum(LENGTHS), M), draw_state(3), boundaries(LENGTHS)
    inputs = [x, *module.parameters(), *state]

    def gradients(call):
        y, after = call(x, state, cu_seqlens=pack)
        loss = y.square().sum() + after.ssm.sum() + after.conv.sum()
        return torch.autograd.grad(loss, inputs)

    again = partial(torch.utils.checkpoint.checkpoint, module, use_reentrant=False)
    assert_close(gradients(again), gradients(module))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_has_no_gradient_whatever_lies_there(module, side):
    real = place(LENGTHS, side)
    x = draw(*real.shape, M).detach()
    x[~real] = torch.nan
    x.requires_grad_()
    y, after = module(x, attention_mask=real)
    loss = y.square().sum() + after.ssm.sum() + after.conv.sum()
    gradients = torch.autograd.grad(loss, [x, *module.parameters()])
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert not gradients[0][~real].any()
    assert gradients[0][real].any()


def test_a_nan_stays_in_its_sequence(module):
    x = draw(sum(LENGTHS), M)
    expected = outcome(alone, module, x, LENGTHS, None)[0]
    spoilt = x.detach().clone()
    spoilt[4] = torch.nan  # all of the second sequence
    spoilt.requires_grad_()
    found = packed(module, spoilt, LENGTHS, None)
    others = torch.arange(sum(LENGTHS)) != 4
    assert found[0][4].isnan().all()
    assert_close(found[0][others], expected[0][others])
    for state, wanted in zip(found[1:], expected[1:], strict=True):
        assert_close(state[[0, 2]], wanted[[0, 2]])
    (gradient,) = torch.autograd.grad(found[0][others].sum(), spoilt)
    assert gradient[others].isfinite().all()


@pytest.mark.refuses
@pytest.mark.parametrize(
    ("shape", "kind", "message"),
    [
        ((1, 9, M), {"cu_seqlens": [0, 9], "lengths": [9]}, "lengths must be None where cu_"),
        ((2, 9, M), {"cu_seqlens": [0, 9]}, "cu_seqlens must come with b=1"),
        ((1, 9, M), {"cu_seqlens": [0, 8]}, r"cu_seqlens must end at l=9, got 8"),
        (
            (2, 9, M),
            {"lengths": [3, 10]},
            "lengths must lie between 1 and l=9, got 10 in row 1",
        ),
        ((2, 2, M), {"attention_mask": [[1, 1], [0, 0]]}, "one run of ones in each row"),
        ((2, M), {"lengths": [1, 1]}, r"x must have shape \(b, l, 6\), got \(2, 6\)"),
    ],
)
def test_what_tells_no_sequences_apart_is_refused(module, shape, kind, message):
    kind = {name: torch.tensor(value, device="cpu") for name, value in kind.items()}
    x = draw(*shape).to(next(module.parameters()).device)
    with pytest.raises(ValueError, match=message):
        module(x, **kind)


@pytest.mark.parametrize("part", [0, 1])
def test_a_state_of_another_number_of_sequences_is_refused(module, part):
    state = list(draw_state(3))
    state[part] = state[part][:2]
    with pytest.raises(ValueError, match=r"state must have .*3"):
        module(draw(1, 12, M), MixerState(*state), cu_seqlens=boundaries(LENGTHS))
