"""Laws of the generation loop."""

import itertools

import pytest
import torch
from torch.testing import assert_close

from mambakit import MambaConfig, MambaLM
from mambakit.generation import generate, stream
from mambakit.generation.sampling import penalise_repetition

V = 21


def draw(b=2, l=6, seed=1):
    chance = torch.Generator("cpu").manual_seed(seed)
    tokens = torch.randint(V, (b, l), generator=chance, device="cpu")
    return tokens.to(torch.get_default_device())


def naive_greedy(model, tokens, k):
    with torch.no_grad():
        for _ in range(k):
            best = model(tokens).logits[:, -1, :V].argmax(-1, keepdim=True)
            tokens = torch.cat([tokens, best], dim=1)
    return tokens


def test_greedy_is_the_most_likely_token_of_the_whole_text_each_time(model):
    assert_close(
        generate(model, draw(), max_new_tokens=12, temperature=0),
        naive_greedy(model, draw(), 12),
    )


def test_rows_of_a_batch_are_as_they_are_alone(model):
    prompts = draw(b=4)
    together = generate(model, prompts, max_new_tokens=10, temperature=0)
    for row in range(4):
        alone = generate(model, prompts[row : row + 1], max_new_tokens=10, temperature=0)
        assert_close(together[row : row + 1], alone)


def test_the_same_seed_gives_the_same_tokens(model):
    def run(**chance):
        return generate(model, draw(), max_new_tokens=20, **chance)

    def generator():
        return torch.Generator().manual_seed(3)

    assert_close(run(seed=3), run(seed=3))
    assert_close(run(generator=generator()), run(generator=generator()))
    assert not torch.equal(run(seed=3), run(seed=4))


def test_without_a_seed_torchs_own_is_used(model):
    torch.manual_seed(5)
    first = generate(model, draw(), max_new_tokens=10)
    torch.manual_seed(5)
    assert_close(generate(model, draw(), max_new_tokens=10), first)


def test_a_seed_leaves_torchs_own_chance_alone(model):
    before = torch.get_rng_state()
    generate(model, draw(), max_new_tokens=3, seed=0)
    assert_close(torch.get_rng_state(), before)


def test_zero_new_tokens_give_the_prompt_unread(model):
    hook = model.register_forward_hook(lambda *_: pytest.fail("the model was asked"))
    assert_close(generate(model, draw(), max_new_tokens=0), draw())
    hook.remove()


def test_int32_prompts_are_taken(model):
    tokens = generate(model, draw().int(), max_new_tokens=2, temperature=0)
    assert_close(tokens, generate(model, draw(), max_new_tokens=2, temperature=0))


def test_streaming_yields_the_same_tokens(model):
    steps = list(stream(model, draw(), max_new_tokens=9, seed=0))
    assert all(step.shape == (2,) for step in steps)
    assert_close(
        torch.stack(steps, dim=1), generate(model, draw(), max_new_tokens=9, seed=0)[:, 6:]
    )


def test_streaming_works_only_as_far_as_it_is_asked(model):
    calls = []
    hook = model.register_forward_hook(lambda *_: calls.append(1))
    list(itertools.islice(stream(model, draw(), max_new_tokens=1000), 3))
    hook.remove()
    assert len(calls) == 3


def test_streaming_leaves_gradients_on_between_tokens(model):
    for _ in stream(model, draw(), max_new_tokens=2):
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()


def test_the_prompt_is_read_in_one_pass_and_then_one_token_at_a_time(model):
    lengths = []
    hook = model.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    generate(model, draw(), max_new_tokens=4)
    hook.remove()
    assert lengths == [6, 1, 1, 1]


def test_a_row_ends_with_its_stop_token_and_repeats_it(model):
    free = generate(model, draw(), max_new_tokens=12, temperature=0)[:, 6:].tolist()
    stop = free[0][3]
    stopped = generate(model, draw(), max_new_tokens=12, temperature=0, stop_tokens=[stop])
    k = stopped.shape[1] - 6
    for row, expected in zip(stopped[:, 6:].tolist(), free, strict=True):
        at = expected.index(stop) if stop in expected else len(expected)
        assert row == (expected[: at + 1] + [stop] * 12)[:k]


def test_it_ends_when_every_row_has_ended(model):
    prompt = draw(b=1)
    free = generate(model, prompt, max_new_tokens=12, temperature=0)[0, 6:].tolist()
    stopped = generate(model, prompt, max_new_tokens=12, temperature=0, stop_tokens=[free[2]])
    assert stopped[0, 6:].tolist() == free[: free.index(free[2]) + 1]


def test_the_repetition_penalty_sees_the_prompt_and_the_new_tokens(model):
    tokens = draw(b=3)
    with torch.no_grad():
        for _ in range(15):
            logits = model(tokens).logits[:, -1, :V]
            seen = torch.zeros(3, V, dtype=torch.bool).scatter_(1, tokens, True)
            best = penalise_repetition(logits, seen, 1.8).argmax(-1, keepdim=True)
            tokens = torch.cat([tokens, best], dim=1)
    settings = {"max_new_tokens": 15, "temperature": 0}
    assert_close(generate(model, draw(b=3), repetition_penalty=1.8, **settings), tokens)
    assert not torch.equal(generate(model, draw(b=3), **settings), tokens)


def test_ids_of_the_padding_are_never_chosen(model):
    with torch.no_grad():
        padded = MambaLM(MambaConfig(d_model=16, n_layer=1, vocab_size=3))
        padded.backbone.embedding.weight[3:] = 100 * padded.backbone.embedding.weight[:1]
    tokens = generate(padded, torch.zeros(8, 1, dtype=torch.int64), max_new_tokens=50)
    assert tokens.max() < 3


@pytest.mark.parametrize("settings", [{"temperature": 0}, {"seed": 0, "top_k": 3}])
@pytest.mark.parametrize("stop_tokens", [(), (1,)])
def test_logits_that_are_no_numbers_are_refused(model, settings, stop_tokens):
    spoilt = MambaLM(model.config)
    spoilt.load_state_dict(model.state_dict())
    spoilt.backbone.norm_f.weight.data[0] = torch.nan
    with pytest.raises(ValueError, match=r"generate: logits must be numbers .* in row 0"):
        generate(spoilt, draw(), max_new_tokens=3, stop_tokens=stop_tokens, **settings)


@pytest.mark.refuses
@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([[1, 2]], "be a tensor, got list"),
        (torch.zeros(1, 0, dtype=torch.int64), "hold at least one token, got none in row 0"),
        (torch.zeros(0, 3, dtype=torch.int64), r"at least one row, got shape \(0, 3\)"),
        (torch.zeros(3, dtype=torch.int64), r"got int64 of shape \(3,\)"),
        (torch.zeros(1, 3), r"got float32 of shape \(1, 3\)"),
        (torch.tensor([[1, V]]), rf"be in \[0, {V}\), got {V}"),
        (torch.tensor([[-1, 2]]), rf"be in \[0, {V}\), got -1"),
        (torch.zeros(1, 2, dtype=torch.int64, device="meta"), "be on cpu .*got meta"),
    ],
)
def test_bad_prompts_are_refused(model, tokens, message):
    with pytest.raises(ValueError, match=f"generate: tokens must .*{message}"):
        generate(model, tokens, max_new_tokens=1)


@pytest.mark.refuses
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": -1}, "max_new_tokens must be a whole number of at least 0, got -1"),
        (
            {"seed": 1, "generator": torch.Generator()},
            "seed and generator must not both be given",
        ),
        ({"stop_tokens": [V]}, rf"stop_tokens must be in \[0, {V}\), got {V}"),
        ({"top_k": 0}, "top_k must be a whole number of at least 1, got 0"),
        ({"max_new_tokens": 2.5}, r"max_new_tokens must be a whole number .*, got 2\.5"),
        ({"max_new_tokens": None}, "max_new_tokens must be a whole number .*, got None"),
        ({"vocab_size": V + 1}, rf"vocab_size must be .* the model's {V}, got {V + 1}"),
        ({"stop_tokens": 3}, "stop_tokens must be a list of ids, got 3"),
        ({"stop_tokens": ["a"]}, rf"stop_tokens must be in \[0, {V}\), got 'a'"),
        ({"stop_tokens": [[1], [2], [3]]}, "stop_tokens must be one list, or one .*prompt, 2"),
        ({"seed": [1, 2, 3]}, "seed must be one number or one for each prompt, 2, got 3"),
        ({"seed": "a"}, "seed must be a whole number, got 'a'"),
        ({"logits_processors": [3]}, "logits_processors must be a list of functions, got 3"),
    ],
)
def test_bad_settings_are_refused_before_the_first_token(model, settings, message):
    with pytest.raises(ValueError, match=f"generate: {message}"):
        stream(model, draw(), **{"max_new_tokens": 1} | settings)


@pytest.mark.parametrize("repetition_penalty", [1.0, 1.2])
def test_only_ids_below_vocab_size_are_chosen(model, repetition_penalty):
    prompt = torch.tensor([[V - 1, V - 2]])
    more = generate(
        model, prompt, max_new_tokens=40, temperature=5.0, seed=0, vocab_size=2,
        repetition_penalty=repetition_penalty,
    )  # fmt: skip
    assert set(more[0, 2:].tolist()) == {0, 1}


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1])
def test_seeds_that_torch_has_no_room_for_are_refused(model, seed):
    with pytest.raises(ValueError, match=r"generate: seed must be .*, got -?\d+$"):
        generate(model, draw(), max_new_tokens=1, seed=seed)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8])
@pytest.mark.parametrize("filling", [0, -100, V])
def test_padding_is_cut_off(model, prompts, side, dtype, filling):
    longest = max(map(len, prompts))
    tokens = torch.full((len(prompts), longest), filling)
    mask = torch.zeros(len(prompts), longest, dtype=dtype)
    for row, kept, prompt in zip(tokens, mask, prompts, strict=True):
        place = slice(longest - len(prompt), None) if side == "left" else slice(len(prompt))
        row[place], kept[place] = prompt, 1
    settings = {"max_new_tokens": 9, "temperature": 0}
    given = {"attention_mask": mask}
    if side == "right" and dtype == torch.int64:
        given = {"lengths": torch.tensor([len(prompt) for prompt in prompts])}
    more = generate(model, tokens, **given, **settings)
    assert_close(more[:, :longest], tokens)
    for row, prompt in zip(more, prompts, strict=True):
        alone = generate(model, prompt[None], **settings)
        assert_close(row[longest:], alone[0, len(prompt) :])
    steps = list(stream(model, tokens, **given, **settings))
    assert_close(torch.stack(steps, dim=1), more[:, longest:])
    assert_close(model.generate(tokens, **given, **settings), more)


def test_a_mask_of_ones_and_a_state_change_nothing(model):
    tokens = draw()
    settings = {"max_new_tokens": 5, "temperature": 0}
    state = model(draw(seed=2)).state
    wanted = generate(model, tokens, state=state, **settings)
    ones = torch.ones_like(tokens)
    assert_close(generate(model, tokens, state=state, attention_mask=ones, **settings), wanted)
    padded = torch.cat([torch.zeros(2, 1, dtype=torch.int64), tokens], dim=1)
    mask = torch.cat([ones[:, :1] * 0, ones], dim=1)
    more = generate(model, padded, state=state, attention_mask=mask, **settings)
    assert_close(more[:, 1:], wanted)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"attention_mask": [[1] * 6] * 2}, "attention_mask must be a tensor, got list"),
        ({"attention_mask": torch.ones(2, 5).long()}, r"shape \(b=2, l=6\), got \(2, 5\)"),
        ({"attention_mask": torch.ones(2, 6)}, "attention_mask must be bool .*got float32"),
        (
            {"attention_mask": torch.tensor([[1] * 6, [1, 1, 0, 1, 1, 1]])},
            "one run of ones in each row, got 2 runs in row 1",
        ),
        (
            {"attention_mask": torch.tensor([[0] * 6, [1] * 6])},
            "one run of ones in each row, got no one in row 0",
        ),
        ({"attention_mask": torch.full((2, 6), 2)}, "0 and 1 alone, got 2 in row 0"),
        (
            {"lengths": torch.tensor([6, 0])},
            "lengths must lie between 1 and l=6, got 0 in row 1",
        ),
        ({"lengths": torch.tensor([7, 1])}, "between 1 and l=6, got 7 in row 0"),
        ({"lengths": torch.tensor([6])}, r"lengths must have shape \(b=2\), got \(1,\)"),
        (
            {"lengths": torch.tensor([6, 6]), "attention_mask": torch.ones(2, 6).long()},
            "attention_mask must be None where lengths is given, got both",
        ),
    ],
)
@pytest.mark.cpu
@pytest.mark.refuses
def test_bad_masks_and_lengths_are_refused(model, given, message):
    with pytest.raises(ValueError, match=f"^generate: .*{message}"):
        generate(model, draw(), max_new_tokens=1, **given)


def test_a_state_stands_for_what_it_has_read(model):
    tokens = draw()
    settings = {"max_new_tokens": 9, "temperature": 0}
    read = model(tokens[:, :4]).state
    whole = generate(model, tokens, **settings)
    assert_close(generate(model, tokens[:, 4:], state=read, **settings), whole[:, 4:])


def test_a_seed_of_its_own_makes_a_row_independent_of_the_batch(model):
    tokens = draw(b=3)
    settings = {"max_new_tokens": 12}
    together = generate(model, tokens, seed=[5, 6, 7], **settings)
    assert_close(generate(model, tokens[[2, 1]], seed=[7, 6], **settings), together[[2, 1]])
    assert_close(generate(model, tokens[:1], seed=5, **settings), together[:1])


def test_a_row_draws_the_same_whichever_rows_have_left(model):
    tokens = draw(b=4)
    free = generate(model, tokens, max_new_tokens=20, seed=1)[:, 6:].tolist()
    ends = [[free[0][2]], [free[1][9]], [], [free[3][0]]]
    stopped = generate(model, tokens, max_new_tokens=20, seed=1, stop_tokens=ends)
    for row, whole, end in zip(stopped[:, 6:].tolist(), free, ends, strict=True):
        at = whole.index(end[0]) + 1 if end else len(whole)
        assert row == whole[:at] + end * (len(row) - at)


@pytest.mark.refuses
@pytest.mark.parametrize(
    ("state", "message"),
    [
        (lambda model: model(draw(b=3)).state, "one sequence for each prompt, 2, got 3"),
        (lambda model: model(draw()), "state must be a ModelState, a Bookmark .*LMOutput"),
        (
            lambda model: model(draw()).state.to("meta"),
            r"state must be on \S+ like the model, got meta",
        ),
        (
            lambda _: MambaLM(MambaConfig(d_model=8, n_layer=2, vocab_size=V))(draw()).state,
            "it is another model's",
        ),
    ],
)
def test_a_state_that_does_not_fit_is_refused(model, state, message):
    with pytest.raises(ValueError, match=message):
        generate(model, draw(), max_new_tokens=1, state=state(model))
