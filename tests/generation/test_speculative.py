"""Laws of speculative decoding: the same distribution, whatever the draft."""

import pytest
import torch
from torch.testing import assert_close

from mambakit import MambaConfig, MambaLM
from mambakit.data import ByteTokenizer
from mambakit.generation import SamplingRules, complete
from mambakit.generation.sampling import pick
from mambakit.generation.speculative import judge

V = 21
GREEDY = {"max_new_tokens": 30, "temperature": 0}


@pytest.fixture
def draft(make_model, model):
    """A model that agrees with the large one often, and often does not."""
    draft = make_model(V)
    draft.load_state_dict(model.state_dict())
    with torch.no_grad():
        draft.lm_head.weight += 0.25 * torch.randn_like(draft.lm_head.weight)
    return draft


def lists(rows):
    return [row.tolist() for row in rows]


def chi_square(counts, expected):
    """Deviations from what is expected in units of chance; about 1 for each cell."""
    return float(((counts - expected) ** 2 / expected).sum())


def forbid_the_last_two(logits, texts):
    return logits.scatter(1, torch.stack([text[-2:] for text in texts]), -torch.inf)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("draft_tokens", [1, 2, 4, 9])
def test_greedy_tokens_are_those_of_the_model_alone(
    model, draft, prompts, draft_tokens, compiled
):
    if not compiled:  # a model with a hook has the plain forward
        model.register_forward_hook(lambda *_: None)
    alone = complete(model, prompts, **GREEDY)
    both = complete(model, prompts, draft=draft, draft_tokens=draft_tokens, **GREEDY)
    assert lists(both.tokens) == lists(alone.tokens)
    assert both.finish_reasons == alone.finish_reasons
    assert 0 < both.acceptance < 1
    for ours, theirs in zip(both.log_probabilities, alone.log_probabilities, strict=True):
        assert_close(ours, theirs)
    assert_close(both.state.layers[1].ssm, alone.state.layers[1].ssm)
    assert_close(both.bookmark.unread, alone.bookmark.unread)


def test_a_draft_that_knows_nothing_changes_nothing(make_model, model, prompts):
    other = make_model(V, d_model=8, n_layer=1)
    done = complete(model, prompts, draft=other, **GREEDY)
    assert lists(done.tokens) == lists(complete(model, prompts, **GREEDY).tokens)


def test_the_draft_guesses_after_the_text_as_it_is(model, draft):
    """The same rounds by hand, the draft reading the whole text for each of its guesses."""

    def likeliest(of, text):
        with torch.no_grad():
            return of(text[None]).logits[0, -1, :V].argmax()[None]

    proposed = accepted = 0
    texts = []
    for start in torch.randint(V, (6, 5)):
        text = start
        while (left := 20 - (len(text) - len(start))) > 0:
            guessed = text
            for _ in range(min(3, left - 1)):
                guessed = torch.cat([guessed, likeliest(draft, guessed)])
            proposed += len(guessed) - len(text)
            for guess in guessed[len(text) :]:
                text = torch.cat([text, likeliest(model, text)])
                if guess != text[-1]:
                    break
                accepted += 1
            else:
                text = torch.cat([text, likeliest(model, text)])
        texts.append(text)
    done = complete(
        model, [text[:5] for text in texts], draft=draft, draft_tokens=3, max_new_tokens=20,
        temperature=0,
    )  # fmt: skip
    assert lists(done.tokens) == [text[5:].tolist() for text in texts]
    assert done.acceptance == accepted / proposed
    assert 0.1 < done.acceptance < 0.9


def test_of_the_model_itself_everything_is_accepted(model, prompts):
    for settings in (GREEDY, {"max_new_tokens": 30, "seed": 0}):
        assert complete(model, prompts, draft=model, **settings).acceptance == 1


def test_a_round_reads_the_weights_of_the_model_once(model, prompts):
    calls = []
    hook = model.register_forward_pre_hook(lambda _, args: calls.append(args[0].shape[1]))
    twin = MambaLM(model.config)
    twin.load_state_dict(model.state_dict())
    done = complete(model, prompts[:1], draft=twin, draft_tokens=4, **GREEDY)
    hook.remove()
    assert done.acceptance == 1
    assert calls == [2, 5, 5, 5, 5, 5, 5]


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1.8},
        {"stop_tokens": [3, 11, 17]},
        {"logits_processors": [forbid_the_last_two]},
        {"max_new_tokens": 0},
        {"max_new_tokens": 1},
        {"vocab_size": 5},
    ],
)
def test_all_settings_hold(model, draft, settings):
    prompt = torch.randint(V, (1, 4))
    settings = GREEDY | settings
    alone = complete(model, prompt, **settings)
    both = complete(model, prompt, draft=draft, **settings)
    assert lists(both.tokens) == lists(alone.tokens)
    assert both.finish_reasons == alone.finish_reasons
    assert_close(both.state.layers[1].ssm, alone.state.layers[1].ssm)
    assert_close(both.bookmark.unread, alone.bookmark.unread)


def test_it_goes_on_where_it_was_left(model, draft, prompts):
    whole = complete(model, prompts, **GREEDY)
    first = complete(model, prompts, draft=draft, **GREEDY | {"max_new_tokens": 11})
    then = complete(model, state=first.bookmark, draft=draft, **GREEDY | {"max_new_tokens": 19})
    pairs = zip(first.tokens, then.tokens, strict=True)
    assert lists(map(torch.cat, pairs)) == lists(whole.tokens)


def test_texts_and_stop_strings(make_model):
    model, draft = make_model(256), make_model(256)
    settings = {"max_new_tokens": 30, "temperature": 0, "tokenizer": ByteTokenizer()}
    alone = complete(model, ["ab", "c"], **settings)
    pieces = []
    stop = alone.texts[0][5:7]
    both = complete(
        model, ["ab", "c"], draft=draft, stop=[stop], on_text=lambda *p: pieces.append(p),
        **settings,
    )  # fmt: skip
    assert both.texts == tuple(text.split(stop)[0] for text in alone.texts)
    assert both.finish_reasons[0] == "stop_string"
    assert "".join(piece for row, piece in pieces if row == 0) == both.texts[0]


@pytest.mark.cpu  # a GPU takes far longer over its small steps, and they are the same
def test_judged_tokens_have_the_wanted_distribution():
    """Two places and the one after them, in 6,000 rounds."""
    torch.manual_seed(0)
    p = torch.randn(3, 4).double().softmax(-1)
    q = torch.randn(2, 4).double().softmax(-1)
    rounds = 6_000
    counts = torch.zeros(3, 4)
    reached = torch.zeros(3)
    chance = torch.rand(rounds, 5, dtype=torch.float64)
    for u in chance:
        proposed = pick(q, u[:2])
        accepted, last = judge(p, q, proposed, u[2:])
        tokens = [*proposed[:accepted].tolist(), int(last)]
        for place, token in enumerate(tokens):
            counts[place, token] += 1
            reached[place] += 1
    for place in range(3):
        assert reached[place] > 500
        assert chi_square(counts[place], reached[place] * p[place]) < 16.3  # 3 degrees: 0.1 %


def test_samples_have_the_distribution_of_the_model(make_model):
    """All texts of three tokens out of three, by chi-square against their probabilities."""
    v, count = 3, 400
    model, draft = make_model(v, d_model=8, n_layer=1), make_model(v, d_model=8, n_layer=1)
    prompt = torch.tensor([[1, 2]])
    settings = {"temperature": 0.8, "top_p": 0.95}
    done = complete(
        model, prompt, samples=count, max_new_tokens=3, draft=draft, draft_tokens=2, seed=0,
        **settings,
    )  # fmt: skip
    assert 0.2 < done.acceptance < 0.95
    places = (torch.stack(done.tokens) * torch.tensor([v * v, v, 1])).sum(1)
    counts = places.bincount(minlength=v**3)

    texts = torch.cartesian_prod(*[torch.arange(v)] * 3)
    with torch.no_grad():
        logits = model(torch.cat([prompt.expand(v**3, -1), texts], dim=1)).logits[:, 1:4, :v]
    rules = SamplingRules(**settings)
    each = rules.apply(logits.flatten(0, 1)).softmax(-1).view(v**3, 3, v)
    expected = count * each.gather(2, texts[:, :, None]).prod(dim=1)[:, 0]
    assert counts[expected == 0].sum() == 0
    # rare texts together, so that each cell has enough to count
    often = expected >= 5
    counts = torch.cat([counts[often], counts[~often].sum()[None]])
    expected = torch.cat([expected[often], expected[~often].sum()[None] + 1e-9])
    degrees = len(expected) - 1
    assert degrees > 10
    assert chi_square(counts, expected) < degrees + 3.5 * (2 * degrees) ** 0.5


def test_no_proposals_have_no_acceptance(model, draft):
    done = complete(model, torch.tensor([[1]]), max_new_tokens=1, draft=draft)
    assert done.acceptance is None


@pytest.mark.parametrize("spoilt", ["model", "draft"])
def test_logits_that_are_no_numbers_are_refused(model, draft, spoilt):
    {"model": model, "draft": draft}[spoilt].lm_head.weight.data[0] = torch.nan
    with pytest.raises(ValueError, match="generate: logits must be numbers"):
        complete(model, torch.tensor([[1]]), max_new_tokens=4, draft=draft)


@pytest.mark.parametrize(
    ("vocab_size", "settings", "message"),
    [
        (V + 1, {}, "draft must have the model's vocab_size, 21, got 22"),
        (V, {"draft_tokens": 0}, "draft_tokens must be a whole number of at least 1, got 0"),
    ],
)
def test_a_draft_that_does_not_fit_is_refused(model, vocab_size, settings, message):
    draft = MambaLM(MambaConfig(8, 1, vocab_size))
    with pytest.raises(ValueError, match=f"generate: {message}"):
        complete(model, torch.tensor([[1]]), max_new_tokens=1, draft=draft, **settings)
