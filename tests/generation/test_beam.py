"""Laws of beam search."""

import codecs

import pytest
import torch
from torch.testing import assert_close

from mambakit.data import ByteTokenizer
from mambakit.generation import beam_search, complete

V = 4


@pytest.fixture
def small(make_model):
    return make_model(V)


def by_hand(model, prompt, longest, ends, penalty):
    """Every continuation with its score, best first."""
    every = torch.cartesian_prod(*[torch.arange(V)] * longest)
    with torch.no_grad():
        texts = torch.cat([prompt.expand(len(every), -1), every], dim=1)
        logits = model(texts).logits[:, len(prompt) - 1 : -1, :V].double()
    log_p = logits.log_softmax(-1).gather(2, every[:, :, None])[:, :, 0]
    found = {}
    for tokens, gains in zip(every.tolist(), log_p, strict=True):
        stops = [at for at, token in enumerate(tokens, start=1) if token in ends]
        length = min([*stops, longest])
        found[tuple(tokens[:length])] = float(gains[:length].sum()) / length**penalty
    return sorted(((score, list(tokens)) for tokens, score in found.items()), reverse=True)


@pytest.mark.parametrize("penalty", [-3.0, -1.0, 0.0, 0.7, 3.0])
@pytest.mark.parametrize(("ends", "best"), [((), 5), ((2,), 5), ((0, 3), 5), ((0, 1, 3), 1)])
def test_a_wide_beam_finds_the_best_of_all(small, penalty, ends, best):
    prompts = [torch.tensor([1, 2, 3]), torch.tensor([0])]
    found = beam_search(
        small, prompts, max_new_tokens=4, beams=V**3, best=best, length_penalty=penalty,
        stop_tokens=ends,
    )  # fmt: skip
    for i, prompt in enumerate(prompts):
        expected = by_hand(small, prompt, 4, ends, penalty)[:best]
        rows = slice(best * i, best * i + best)
        assert_close(torch.tensor(found.scores[rows]), torch.tensor([s for s, _ in expected]))
        assert [row.tolist() for row in found.tokens[rows]] == [t for _, t in expected]


def test_one_beam_is_greedy(model, prompts):
    found = beam_search(model, prompts, max_new_tokens=9, beams=1)
    greedy = complete(model, prompts, max_new_tokens=9, temperature=0)
    for row in range(len(prompts)):
        assert_close(found.tokens[row], greedy.tokens[row])
        assert_close(found.log_probabilities[row].float(), greedy.log_probabilities[row])
    assert_close(found.state.layers[1].ssm, greedy.state.layers[1].ssm)


@pytest.mark.parametrize("ends", [(), (2,)])
@pytest.mark.parametrize("beams", [2, V**3])
def test_a_beam_without_a_token_dies_and_the_others_live(small, ends, beams):
    """After a 1 nothing may come, so that it is the last token or there is none."""

    def dead_end(logits, texts):
        after = torch.stack([text[-1] == 1 for text in texts])
        return logits.masked_fill(after[:, None], -torch.inf)

    prompts = [torch.tensor([1, 2, 3]), torch.tensor([0])]
    settings = {"max_new_tokens": 3, "beams": beams, "best": 2, "stop_tokens": ends}
    found = beam_search(small, prompts, logits_processors=[dead_end], **settings)
    assert len(found) == 4
    for i, prompt in enumerate(prompts):
        every = by_hand(small, prompt, 3, ends, 1.0)
        left = [(score, tokens) for score, tokens in every if 1 not in tokens[:-1]]
        if beams > 2:
            rows = slice(2 * i, 2 * i + 2)
            assert [row.tolist() for row in found.tokens[rows]] == [t for _, t in left[:2]]
            assert_close(
                torch.tensor(found.scores[rows]), torch.tensor([s for s, _ in left[:2]])
            )
    assert all(1 not in row.tolist()[:-1] for row in found.tokens)


def test_a_prompt_whose_beams_have_all_died_is_refused(small):
    def dead_end(logits, texts):
        long = torch.tensor([len(text) >= 3 and int(text[0]) == 3 for text in texts])
        return logits.masked_fill(long[:, None], -torch.inf)

    settings = {"max_new_tokens": 4, "beams": 3, "logits_processors": [dead_end]}
    assert len(beam_search(small, torch.tensor([[2]]), **settings)) == 1
    with pytest.raises(ValueError, match=r"allow at least one token, .* in row 1: "):
        beam_search(small, torch.tensor([[2], [3]]), **settings)
    early = beam_search(small, torch.tensor([[3]]), stop_tokens=[0], **settings)
    assert [row.tolist()[-1] for row in early.tokens] == [0]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_one_beam_of_no_numbers_is_refused(small, value):
    def spoil(logits, texts):
        logits[-1, 0] = value if len(texts) > 1 else 0.0
        return logits

    with pytest.raises(ValueError, match="logits must be numbers"):
        beam_search(small, torch.tensor([[1]]), max_new_tokens=3, logits_processors=[spoil])


def test_prompts_are_searched_as_alone(model, prompts):
    settings = {"max_new_tokens": 8, "beams": 3, "best": 2, "stop_tokens": [3, 7, 8]}
    together = beam_search(model, prompts, **settings)
    for i, prompt in enumerate(prompts):
        alone = beam_search(model, [prompt], **settings)
        rows = slice(2 * i, 2 * i + 2)
        assert [r.tolist() for r in together.tokens[rows]] == [r.tolist() for r in alone.tokens]
        assert together.finish_reasons[rows] == alone.finish_reasons


@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_scores_states_and_places_are_those_of_the_tokens(model, prompts, penalty):
    found = beam_search(
        model, prompts, max_new_tokens=6, beams=4, best=3, stop_tokens=[2, 9],
        length_penalty=penalty,
    )  # fmt: skip
    for row, tokens in enumerate(found.tokens):
        ended = found.finish_reasons[row] == "stop_token"
        assert ended == (int(tokens[-1]) in {2, 9})
        assert ended or len(tokens) == 6
        text = torch.cat([prompts[row // 3], tokens])
        with torch.no_grad():
            out = model(text[None, :-1])
        log_p = out.logits[0, -len(tokens) :, :21].log_softmax(-1).gather(1, tokens[:, None])
        assert_close(found.log_probabilities[row].float(), log_p[:, 0])
        score = float(log_p.sum()) / len(tokens) ** penalty
        assert found.scores[row] == pytest.approx(score, abs=1e-5)
        assert_close(found.state[row].layers[1].ssm, out.state.layers[1].ssm)
        assert found.bookmark.unread[row].tolist() == [text[-1]]


def test_it_does_not_search_on_when_nothing_can_improve(small):
    """A model that always ends: log p of the end is near 0, and nothing else comes near."""
    calls = []
    hook = small.register_forward_hook(lambda *_: calls.append(1))
    found = beam_search(
        small, torch.tensor([[1]]), max_new_tokens=50, beams=3, stop_tokens=[2],
        logits_processors=[lambda logits, _: logits.index_fill(1, torch.tensor([2]), 30.0)],
    )  # fmt: skip
    hook.remove()
    assert (found.tokens[0].tolist(), len(calls)) == ([2], 1)


def test_it_searches_on_where_the_next_length_can_improve_and_the_longest_cannot(model):
    """A short text of a rare end against a longer one of a likely end."""

    def rarely_at_first(logits, texts):
        first = torch.tensor([[-6.0, 0.0, -20.0]])
        return first if len(texts[0]) == 1 else first.flip(1).expand(len(texts), -1) * -1

    found = beam_search(
        model, torch.tensor([[1]]), max_new_tokens=20, beams=2, stop_tokens=[0], vocab_size=3,
        length_penalty=-3.0, logits_processors=[rarely_at_first],
    )  # fmt: skip
    assert found.tokens[0].tolist() == [1, 0]


def test_processors_and_a_smaller_vocabulary_hold(model):
    def never_again(logits, texts):
        return logits.scatter(1, torch.stack(texts), -torch.inf)

    found = beam_search(
        model, torch.tensor([[1]]), max_new_tokens=5, vocab_size=9, best=4,
        logits_processors=[never_again],
    )  # fmt: skip
    for tokens in found.tokens:
        assert len({1, *tokens.tolist()}) == 6
        assert tokens.max() < 9


def test_fewer_come_back_where_there_are_not_so_many(model):
    found = beam_search(
        model, torch.tensor([[1]]), max_new_tokens=1, vocab_size=2, beams=4, best=4
    )
    assert sorted(row.tolist() for row in found.tokens) == [[0], [1]]


def test_it_goes_on_from_a_bookmark(model, prompts):
    first = complete(model, prompts, max_new_tokens=3, temperature=0)
    whole = [torch.cat(pair) for pair in zip(prompts, first.tokens, strict=True)]
    settings = {"max_new_tokens": 5, "beams": 3}
    then = beam_search(model, state=first.bookmark, **settings)
    expected = beam_search(model, whole, **settings)
    assert [row.tolist() for row in then.tokens] == [row.tolist() for row in expected.tokens]


def text_of(tokens, *, ended):
    """Decode bytes; where there was no room for more, a character cut in two is left out."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    return decoder.decode(bytes(tokens.tolist()), final=ended)


def test_texts_leave_out_the_end_token(make_model):
    model = make_model(256)
    settings = {"max_new_tokens": 12, "beams": 3, "best": 3, "tokenizer": ByteTokenizer()}
    free = beam_search(model, ["ab"], **settings)
    for text, tokens in zip(free.texts, free.tokens, strict=True):
        assert text == text_of(tokens, ended=False)
    end = int(free.tokens[0][4])
    ended = beam_search(model, ["ab"], stop_tokens=[end], length_penalty=9.0, **settings)
    for text, tokens, reason in zip(
        ended.texts, ended.tokens, ended.finish_reasons, strict=True
    ):
        stopped = reason == "stop_token"
        assert text == text_of(tokens[:-1] if stopped else tokens, ended=stopped)


def test_beams_share_the_prompt(model):
    """The prompt is read once, and each step reads one token for each beam."""
    shapes = []
    hook = model.register_forward_pre_hook(lambda _, args: shapes.append(args[0].shape))
    beam_search(model, torch.randint(21, (1, 7)), max_new_tokens=4, beams=3)
    hook.remove()
    assert shapes == [(1, 7), (3, 1), (3, 1), (3, 1)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be a whole number of at least 1, got 0"),
        ({"beams": 0}, "beams must be a whole number of at least 1, got 0"),
        ({"beams": 2, "best": 3}, "best must be a whole number from 1 to beams=2, got 3"),
        ({"length_penalty": 99}, "length_penalty must be from -10 to 10, got 99"),
        ({"length_penalty": float("nan")}, "length_penalty must be from -10 to 10, got nan"),
        ({"stop_tokens": [21]}, r"stop_tokens must be in \[0, 21\), got 21"),
        ({"vocab_size": 22}, "vocab_size must be .* the model's 21, got 22"),
    ],
)
def test_bad_settings_are_refused(model, settings, message):
    with pytest.raises(ValueError, match=f"generate: {message}"):
        beam_search(model, torch.tensor([[1]]), **{"max_new_tokens": 1} | settings)


def test_logits_that_are_no_numbers_are_refused(model):
    model.lm_head.weight.data[0] = torch.nan
    with pytest.raises(ValueError, match="generate: logits must be numbers"):
        beam_search(model, torch.tensor([[1]]), max_new_tokens=2)


def test_a_beam_finds_what_greedy_misses(make_model):
    """Over many prompts, the best of a beam is never worse than greedy and often better."""
    model = make_model(21)
    prompts = [torch.tensor([i]) for i in range(21)]
    beam = beam_search(model, prompts, max_new_tokens=6, beams=6, length_penalty=0.0)
    greedy = complete(model, prompts, max_new_tokens=6, temperature=0)
    totals = torch.tensor([float(row.sum()) for row in greedy.log_probabilities])
    gains = torch.tensor(beam.scores) - totals
    assert (gains > 1e-3).sum() > 5
    assert gains.mean() > 0
