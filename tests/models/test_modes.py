"""One model in every mode: chunked, stepped, packed and padded are each sequence alone."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.testing import assert_close

from mambakit import MambaConfig, MambaLM
from mambakit.models import ModelState
from mambakit.modules import MixerState
from mambakit.ops._backends import why_not_fused

CONFIG = MambaConfig(d_model=16, n_layer=2, vocab_size=21, d_state=4, bias=True)
# A norm of one number is its sign: of rank 1 it would tell nothing but which rounding it had.
CONFIGS = {"mamba": CONFIG, "falcon": replace(CONFIG, dt_rank=4, selection_norm_eps=1e-6)}
BACKENDS = ["reference", "parallel", "fused"]
NOWHERE = 10**6  # a token that no embedding has: what is padding is never looked up


@pytest.fixture(
    scope="module",
    params=[(name, backend) for name in CONFIGS for backend in BACKENDS],
    ids=" ".join,
)
def model(request, chosen_device):
    name, backend = request.param
    why_not = why_not_fused("Mamba", chosen_device) if backend == "fused" else None
    if why_not is not None:
        pytest.skip(why_not)
    torch.manual_seed(0)
    model = MambaLM(CONFIGS[name], backend=backend)
    with torch.no_grad():
        for parameter in model.parameters():  # biases that are not zero, too
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(chosen_device)


def draw(*shape, seed=1):
    source = torch.Generator().manual_seed(seed)
    tokens = torch.randint(CONFIG.vocab_size, shape, generator=source, device="cpu")
    return tokens.to(torch.get_default_device())


def draw_state(count, seed=2):
    """What came before, with gradients wanted."""
    source = torch.Generator().manual_seed(seed)

    def part(size):
        tensor = torch.randn(count, CONFIG.d_inner, size, generator=source, device="cpu")
        return (0.5 * tensor).to(torch.get_default_device()).requires_grad_()

    return ModelState(
        tuple(MixerState(part(CONFIG.d_conv - 1), part(CONFIG.d_state)) for _ in range(2))
    )


def parts(state):
    return [] if state is None else [part for layer in state.layers for part in layer]


def boundaries(lengths):
    return torch.tensor([0, *lengths], device="cpu").cumsum(0)


def pad(sequences, side):
    """Rows of one length with nonsense at one side, and the mask that tells it apart."""
    longest = max(map(len, sequences))
    rows = torch.full((len(sequences), longest), NOWHERE)
    mask = torch.zeros(len(sequences), longest, dtype=torch.int64)
    for row, real, sequence in zip(rows, mask, sequences, strict=True):
        here = slice(longest - len(sequence), None) if side == "left" else slice(len(sequence))
        row[here], real[here] = sequence, 1
    return rows, mask


def alone(model, sequences, state):
    outputs = [
        model(sequence[None], None if state is None else state[i])
        for i, sequence in enumerate(sequences)
    ]
    logits = torch.cat([output.logits[0] for output in outputs])
    return logits, ModelState.cat([output.state for output in outputs])


def packed(model, sequences, state):
    logits, after = model(
        torch.cat(sequences)[None], state, cu_seqlens=boundaries(map(len, sequences))
    )
    return logits[0], after


def left_padded(model, sequences, state):
    tokens, mask = pad(sequences, "left")
    logits, after = model(tokens, state, attention_mask=mask)
    assert not logits[mask == 0].any()
    return logits[mask == 1], after


def right_padded(model, sequences, state):
    tokens, mask = pad(sequences, "right")
    logits, after = model(tokens, state, attention_mask=mask.bool())
    assert not logits[mask == 0].any()
    return logits[mask == 1], after


def with_lengths(model, sequences, state):
    tokens, mask = pad(sequences, "right")
    logits, after = model(tokens, state, lengths=mask.sum(1))
    return logits[mask == 1], after


def stepped(model, sequences, state):
    """Token by token, side by side; what has ended leaves the batch."""
    pieces = [[] for _ in sequences]
    ends = [None] * len(sequences)
    going = list(range(len(sequences)))
    t = 0
    while going:
        tokens = torch.stack([sequences[i][t : t + 1] for i in going])
        logits, state = model(tokens, state)
        t += 1
        for row, i in enumerate(going):
            pieces[i].append(logits[row])
            ends[i] = state[row]
        stay = [row for row, i in enumerate(going) if len(sequences[i]) > t]
        going = [going[row] for row in stay]
        state = state[stay]
    return torch.cat([piece for each in pieces for piece in each]), ModelState.cat(ends)


def cut(first, second):
    """Read the heads of all sequences in one mode, and their tails in another."""

    def run(model, sequences, state):
        places = [(7 * i + 3) % (len(sequence) + 1) for i, sequence in enumerate(sequences)]
        logits = [[] for _ in sequences]
        at = [None if state is None else state[i] for i in range(len(sequences))]
        for mode, pieces in (
            (first, [s[:place] for s, place in zip(sequences, places, strict=True)]),
            (second, [s[place:] for s, place in zip(sequences, places, strict=True)]),
        ):
            # no sequence of a pack is empty, and those that have begun are in another pack
            there = [i for i, piece in enumerate(pieces) if len(piece)]
            begun = [i for i in there if at[i] is not None]
            for some in filter(None, (begun, [i for i in there if i not in begun])):
                before = ModelState.cat([at[i] for i in some]) if some is begun else None
                found, after = mode(model, [pieces[i] for i in some], before)
                for row, (i, piece) in enumerate(
                    zip(some, found.split([len(pieces[i]) for i in some]), strict=True)
                ):
                    logits[i].append(piece)
                    at[i] = after[row]
        return torch.cat([piece for each in logits for piece in each]), ModelState.cat(at)

    return run


MODES = {
    "packed": packed,
    "left padded": left_padded,
    "right padded": right_padded,
    "lengths": with_lengths,
    "stepped": stepped,
    "packs that continue packs": cut(packed, packed),
    "steps that continue packs": cut(packed, stepped),
    "packs that continue padded rows": cut(left_padded, packed),
    "padded rows that continue steps": cut(stepped, left_padded),
}


def outcome(mode, model, sequences, state):
    """Logits, states, and the gradient of all of them to all there is."""
    logits, after = mode(model, sequences, state)
    results = [logits, *parts(after)]
    source = torch.Generator().manual_seed(3)
    loss = sum(
        (result * torch.randn(result.shape, generator=source, device="cpu").to(result)).sum()
        for result in results
    )
    gradients = torch.autograd.grad(loss, [*model.parameters(), *parts(state)])
    return results, gradients


def assert_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        error = (one - other).abs().max() if one.numel() else torch.zeros(())
        scale = other.abs().max().clamp(min=1) if one.numel() else torch.ones(())
        assert error <= 1e-5 * scale


@pytest.mark.parametrize("mode", MODES)
@settings(deadline=None, max_examples=20)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5), begun=st.booleans())
def test_every_mode_is_each_sequence_alone(model, mode, lengths, begun):
    sequences = list(draw(sum(lengths)).split(lengths))
    state = draw_state(len(lengths)) if begun else None
    found = outcome(MODES[mode], model, sequences, state)
    expected = outcome(alone, model, sequences, state)
    for one, other in zip(found, expected, strict=True):
        assert_same(one, other)


@pytest.mark.parametrize("lengths", [[1] * 40, [70, 1, 3], [300]])
def test_many_short_sequences_and_few_long_ones(model, lengths):
    sequences = list(draw(sum(lengths)).split(lengths))
    state = draw_state(len(lengths))
    for one, other in zip(
        outcome(packed, model, sequences, state),
        outcome(alone, model, sequences, state),
        strict=True,
    ):
        assert_same(one, other)


LENGTHS = [4, 1, 7]


@pytest.fixture
def sequences():
    return list(draw(sum(LENGTHS)).split(LENGTHS))


def test_last_only_scores_the_last_token_of_each_sequence(model, sequences):
    whole, state = alone(model, sequences, None)
    expected = whole[boundaries(LENGTHS)[1:] - 1]
    tokens, mask = pad(sequences, "right")
    calls = [
        (torch.cat(sequences)[None], {"cu_seqlens": boundaries(LENGTHS)}),
        (tokens, {"lengths": torch.tensor(LENGTHS)}),
        (tokens, {"attention_mask": mask}),
    ]
    tokens, mask = pad(sequences, "left")
    for rows, kind in [*calls, (tokens, {"attention_mask": mask})]:
        last = model(rows, last_only=True, **kind)
        assert last.logits.shape == (3, 1, 24)
        assert_same([last.logits[:, 0], *parts(last.state)], [expected, *parts(state)])


def test_a_mask_of_ones_and_a_pack_of_one_change_nothing(model):
    tokens = draw(2, 6)
    expected = model(tokens)
    found = model(tokens, attention_mask=torch.ones(2, 6, dtype=torch.bool))
    assert_same([found.logits, *parts(found.state)], [expected.logits, *parts(expected.state)])
    found = model(tokens[:1], cu_seqlens=torch.tensor([0, 6], dtype=torch.int32))
    assert_same([found.logits], [expected.logits[:1]])


def test_the_backbone_pads_and_packs_alone(model, sequences):
    x, state = model.backbone(torch.cat(sequences)[None], cu_seqlens=boundaries(LENGTHS))
    tokens, mask = pad(sequences, "left")
    padded, after = model.backbone(tokens, attention_mask=mask)
    assert not padded[mask == 0].any()
    assert_same([padded[mask == 1], *parts(after)], [x[0], *parts(state)])


def spoil(model):
    """Let the token 0 be NaN wherever it is read."""
    spoilt = MambaLM(model.config, backend=model.backbone.layers[0].mixer.backend)
    spoilt.load_state_dict(model.state_dict())
    spoilt = spoilt.to(model.device)
    with torch.no_grad():
        spoilt.backbone.embedding.weight[0] = torch.nan
    return spoilt


def test_a_nan_stays_in_its_sequence(model, sequences):
    sequences = [sequence.clamp(min=1) for sequence in sequences]
    expected, state = alone(model, sequences, None)
    sequences[1][:] = 0
    spoilt = spoil(model)
    logits, after = packed(spoilt, sequences, None)
    own = torch.zeros(len(logits), dtype=torch.bool).index_fill(0, torch.tensor([4]), True)
    ids = slice(1, CONFIG.vocab_size)  # the output layer is the embedding
    assert logits[own].isnan().all()
    assert_same([logits[~own, ids]], [expected[~own, ids]])
    for found, wanted in zip(parts(after), parts(state), strict=True):
        assert_same([found[[0, 2]]], [wanted[[0, 2]]])


def test_gradients_of_a_nan_stay_in_its_sequence(model, sequences):
    state = draw_state(3)
    with torch.no_grad():
        state.layers[0].ssm[1] = torch.nan
    logits, _ = packed(model, sequences, state)
    per_sequence = logits.split(LENGTHS)
    gradients = torch.autograd.grad(
        per_sequence[0].sum() + per_sequence[2].sum(), parts(state), retain_graph=True
    )
    for gradient in gradients:
        assert gradient[[0, 2]].isfinite().all()
    (gradient,) = torch.autograd.grad(per_sequence[1].sum(), [state.layers[0].ssm])
    assert not gradient[[0, 2]].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_shorter_dtypes_are_packed_as_well_as_alone(sequences, dtype):
    torch.manual_seed(0)
    model = MambaLM(CONFIG, dtype=dtype)
    found, state = packed(model, sequences, None)
    expected, after = alone(model, sequences, None)
    assert found.dtype == dtype
    assert_close(found, expected, rtol=2e-2, atol=2e-2)
    assert state.layers[0].ssm.dtype == after.layers[0].ssm.dtype == torch.float32


def test_packing_works_under_autocast(sequences, device):
    torch.manual_seed(0)
    model = MambaLM(CONFIG)
    with torch.autocast(device.type, torch.bfloat16):
        found, _ = packed(model, sequences, None)
        expected, _ = alone(model, sequences, None)
    assert_close(found, expected, rtol=2e-2, atol=2e-2)


TOKENS = torch.zeros(1, 10, dtype=torch.int64, device="cpu")
ROWS = torch.zeros(2, 4, dtype=torch.int64, device="cpu")


def ints(*values):
    return torch.tensor(values, device="cpu")


@pytest.mark.refuses
@pytest.mark.parametrize(
    ("tokens", "kind", "message"),
    [
        (TOKENS, {"cu_seqlens": ints(3, 10)}, "cu_seqlens must start at 0, got 3"),
        (
            TOKENS,
            {"cu_seqlens": ints(0, 5, 5, 10)},
            "cu_seqlens must rise, got 5 after 5 at index 2",
        ),
        (
            TOKENS,
            {"cu_seqlens": ints(0, 7, 5, 10)},
            "cu_seqlens must rise, got 5 after 7 at index 2",
        ),
        (TOKENS, {"cu_seqlens": ints(0, 5, 9)}, "cu_seqlens must end at l=10, got 9"),
        (
            TOKENS,
            {"cu_seqlens": ints(0.0, 10.0)},
            "cu_seqlens must be int32 or int64, got float32",
        ),
        (
            TOKENS,
            {"cu_seqlens": ints([0, 10])},
            r"cu_seqlens must have shape \(s\+1\) .* got \(1, 2\)",
        ),
        (
            TOKENS,
            {"cu_seqlens": ints(0)},
            "cu_seqlens must have shape .* with at least one sequence",
        ),
        (TOKENS, {"cu_seqlens": [0, 10]}, "cu_seqlens must be a tensor, got list"),
        (ROWS, {"cu_seqlens": ints(0, 4)}, "cu_seqlens must come with b=1, one row .* got b=2"),
        (ROWS, {"lengths": ints(2, 0)}, "lengths must lie between 1 and l=4, got 0 in row 1"),
        (ROWS, {"lengths": ints(2, 5)}, "lengths must lie between 1 and l=4, got 5 in row 1"),
        (ROWS, {"lengths": ints(2, 2, 2)}, r"lengths must have shape \(b=2\), got \(3,\)"),
        (ROWS, {"lengths": ints(1.0, 2.0)}, "lengths must be int32 or int64, got float32"),
        (
            ROWS,
            {"attention_mask": ints([1, 0, 1, 1], [1, 1, 1, 1])},
            "one run of ones in each row, got 2 runs in row 0",
        ),
        (
            ROWS,
            {"attention_mask": ints([1, 1, 1, 1], [0, 0, 0, 0])},
            "one run of ones in each row, got no one in row 1",
        ),
        (
            ROWS,
            {"attention_mask": ints([1, 1, 1, 1], [0, 2, 1, 1])},
            "must hold 0 and 1 alone, got 2 in row 1",
        ),
        (
            ROWS,
            {"attention_mask": ints([1, 1, 1], [0, 1, 1])},
            r"attention_mask must have shape \(b=2, l=4\), got \(2, 3\)",
        ),
        (
            ROWS,
            {"attention_mask": ints([1.0, 1, 1, 1], [0, 1, 1, 1])},
            "attention_mask must be bool or of integers, got float32",
        ),
        (
            TOKENS,
            {"cu_seqlens": ints(0, 10), "lengths": ints(10)},
            "lengths must be None where cu_seqlens is given, got both",
        ),
    ],
)
def test_bad_packings_are_refused_in_one_sentence(tokens, kind, message):
    model = MambaLM(CONFIG)
    for call in (model, model.backbone):
        with pytest.raises(ValueError, match=rf"^MambaLM: .*{message}") as error:
            call(tokens, **kind)
        assert "\n" not in str(error.value)


def test_forks_go_on_in_one_pack_each_for_itself(model, sequences):
    """They share their memory, which no kernel may take for three states side by side."""
    forks = model(draw(1, 5, seed=4)).state.fork(3)
    found, expected = (mode(model, sequences, forks) for mode in (packed, alone))
    assert_same([found[0], *parts(found[1])], [expected[0], *parts(expected[1])])


def test_hooks_of_the_backbone_are_heard(model, sequences):
    seen = []
    hook = model.backbone.register_forward_hook(
        lambda module, given, output: seen.append(output[0].shape)
    )
    left_padded(model, sequences, None)
    hook.remove()
    assert seen == [(1, sum(LENGTHS), 16)]


@pytest.mark.refuses
def test_a_state_of_another_number_of_sequences_is_refused():
    model = MambaLM(CONFIG)
    state = model(draw(2, 5)).state
    with pytest.raises(ValueError, match="as many sequences as the pack, 3, got 2"):
        model(TOKENS, state, cu_seqlens=ints(0, 1, 2, 10))
    with pytest.raises(ValueError, match="as many sequences as the pack, 3, got 2"):
        model(TOKENS.expand(3, -1), state, lengths=ints(1, 2, 3))


@pytest.mark.refuses
def test_another_models_state_is_refused_with_a_packing():
    other = MambaLM(MambaConfig(d_model=8, n_layer=2, vocab_size=21, d_state=4))
    with pytest.raises(ValueError, match=r"got \(2, 16, 3\): it is another model's$"):
        MambaLM(CONFIG)(TOKENS, other(draw(2, 5)).state, cu_seqlens=ints(0, 1, 10))
