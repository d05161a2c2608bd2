"""Laws of the engine: rows of any length, forks, probabilities, reasons, and going on."""

import re

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from mambakit import MambaConfig, MambaLM
from mambakit.data import ByteTokenizer
from mambakit.generation import Bookmark, beam_search, complete, generate, stream
from mambakit.models.state_file import write_layers

V = 21
GREEDY = {"max_new_tokens": 8, "temperature": 0}


def lists(rows):
    return [row.tolist() for row in rows]


def probabilities(model, tokens):
    """The log-probabilities of each next token, computed over the whole text."""
    with torch.no_grad():
        return model(tokens[None]).logits[0, :, :V].log_softmax(-1)


def test_prompts_of_any_lengths_are_continued_as_alone(model, prompts):
    together = complete(model, prompts, **GREEDY)
    for row, prompt in enumerate(prompts):
        alone = generate(model, prompt[None], **GREEDY)[0, len(prompt) :]
        assert_close(together.tokens[row], alone)


def test_each_length_is_read_once_and_decoding_is_one_batch(model, prompts):
    shapes = []
    hook = model.register_forward_pre_hook(lambda _, args: shapes.append(args[0].shape))
    complete(model, prompts, max_new_tokens=3, samples=2)
    hook.remove()
    assert shapes == [(2, 3), (1, 1), (1, 5), (8, 1), (8, 1)]


def test_a_row_that_has_ended_leaves_the_batch(model, prompts):
    free = lists(complete(model, prompts, **GREEDY).tokens)
    ends = [[free[0][2]], [free[1][5]], [], [free[3][0]]]
    sizes = []
    hook = model.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    done = complete(model, prompts, stop_tokens=ends, **GREEDY)
    hook.remove()
    expected = [
        row[: row.index(end[0]) + 1] if end else row
        for row, end in zip(free, ends, strict=True)
    ]
    assert lists(done.tokens) == expected
    assert done.finish_reasons == ("stop_token", "stop_token", "length", "stop_token")
    late = model.device.type == "cuda"  # which looks at a token while the next is computed
    assert sizes[3:] == [sum(len(row) + late > k for row in expected) for k in range(1, 8)]


def test_the_repetition_penalty_follows_rows_that_leave_the_batch(model, prompts):
    settings = GREEDY | {"repetition_penalty": 2.5}
    free = lists(complete(model, prompts, **settings).tokens)
    done = complete(
        model, prompts, stop_tokens=[[free[0][0]], [free[1][1]], [], []], **settings
    )
    assert lists(done.tokens) == [free[0][:1], free[1][:2], *free[2:]]


def test_samples_of_a_prompt_lie_in_succession_and_differ(model, prompts):
    settings = {"max_new_tokens": 10, "seed": [3, 4, 5, 6]}
    done = complete(model, prompts, samples=3, **settings)
    assert len(done) == 12
    alone = complete(model, prompts[2:3], samples=3, max_new_tokens=10, seed=[5])
    assert lists(done.tokens)[6:9] == lists(alone.tokens)
    assert len({*map(tuple, lists(alone.tokens))}) == 3
    first = complete(model, prompts, **settings)
    assert lists(done.tokens)[::3] == lists(first.tokens)


def test_a_thousand_samples_begin_in_the_memory_of_one(model):
    before = []
    hook = model.register_forward_pre_hook(lambda _, args: before.append(args[1:]))
    complete(model, torch.randint(V, (1, 4)), max_new_tokens=2, samples=1000)
    hook.remove()
    (state,) = before[1]
    one = model(torch.randint(V, (1, 4))).state
    assert (len(state), state.nbytes) == (1000, one.nbytes)


def test_log_probabilities_are_the_models_own(model, prompts):
    settings = {"temperature": 0.5, "top_k": 4, "repetition_penalty": 1.5, "seed": 0}
    done = complete(model, prompts, max_new_tokens=6, alternatives=3, **settings)
    for row, prompt in enumerate(prompts):
        every = probabilities(model, torch.cat([prompt, done.tokens[row]]))[
            len(prompt) - 1 : -1
        ]
        tokens = done.tokens[row]
        assert_close(done.log_probabilities[row], every.gather(1, tokens[:, None])[:, 0])
        best = every.topk(3)
        assert_close(done.alternatives[row].tokens, best.indices)
        assert_close(done.alternatives[row].log_probabilities, best.values)


def test_without_being_asked_there_are_no_alternatives(model, prompts):
    done = complete(model, prompts, **GREEDY)
    assert (done.alternatives, done.texts, done.scores, done.acceptance) == (None,) * 4


def test_processors_see_the_tokens_so_far_and_change_the_logits(model, prompts):
    """Each token must be the one before, plus one."""
    seen = []

    def count_up(logits, texts):
        seen.append([text.tolist() for text in texts])
        allowed = torch.stack([(text[-1] + 1) % V for text in texts])
        return torch.full_like(logits, -torch.inf).scatter(1, allowed[:, None], 0.0)

    ends = [[(int(prompt[-1]) + 3) % V] for prompt in prompts[:2]] + [[], []]
    done = complete(
        model, prompts, max_new_tokens=4, stop_tokens=ends, logits_processors=[count_up]
    )
    for row, prompt in enumerate(prompts):
        count = 3 if row < 2 else 4
        assert done.tokens[row].tolist() == [
            (int(prompt[-1]) + 1 + k) % V for k in range(count)
        ]
    assert seen[0] == lists(prompts)
    assert seen[3] == [
        [*prompts[row].tolist(), *done.tokens[row][:3].tolist()] for row in (2, 3)
    ]


@pytest.mark.parametrize(
    ("processor", "message"),
    [
        (lambda logits, _: logits[:, :3], rf"return logits of shape \(1, {V}\), got \(1, 3\)"),
        (lambda *_: None, "got None"),
        (lambda logits, _: logits * torch.nan, "logits must be numbers .* in row 0"),
        (lambda logits, _: logits - torch.inf, "allow at least one token"),
    ],
)
def test_what_a_processor_must_return(model, processor, message):
    with pytest.raises(ValueError, match=message):
        complete(model, torch.tensor([[1]]), logits_processors=[processor], **GREEDY)


@pytest.mark.parametrize("rules", [{"temperature": 0}, {"seed": 2, "samples": 3}])
def test_a_processor_may_write_into_what_it_is_given(model, prompts, rules):
    def forbid(logits, _):
        logits[:, : V // 2] = -torch.inf
        return logits

    def result(processor):
        return complete(
            model, prompts[:1], max_new_tokens=6, logits_processors=[processor], **rules
        )

    wanted = result(lambda logits, texts: forbid(logits.clone(), texts))
    got = result(forbid)
    assert lists(got.tokens) == lists(wanted.tokens)
    for one, other in zip(got.log_probabilities, wanted.log_probabilities, strict=True):
        assert_close(one, other)


@pytest.mark.parametrize("cut", [0, 1, 5])
def test_it_goes_on_where_it_was_left(model, prompts, cut):
    whole = complete(model, prompts, **GREEDY)
    first = complete(model, prompts, **GREEDY | {"max_new_tokens": cut})
    then = complete(model, state=first.bookmark, **GREEDY | {"max_new_tokens": 8 - cut})
    pairs = zip(first.tokens, then.tokens, strict=True)
    assert lists(map(torch.cat, pairs)) == lists(whole.tokens)
    assert_close(then.state.layers[0].ssm, whole.state.layers[0].ssm)


def test_the_state_has_read_all_but_the_last_token(model, prompts):
    free = lists(complete(model, prompts, **GREEDY).tokens)
    ends = [[row[at]] for row, at in zip(free, (4, 0, 6, 2), strict=True)]
    done = complete(model, prompts, stop_tokens=ends, **GREEDY)
    assert len({*map(len, done.tokens)}) > 2
    for row, prompt in enumerate(prompts):
        text = torch.cat([prompt, done.tokens[row]])
        expected = model(text[None, :-1]).state
        assert_close(done.state[row].layers[1].ssm, expected.layers[1].ssm)
        assert_close(done.state[row].layers[1].conv, expected.layers[1].conv)
        assert done.bookmark.unread[row].tolist() == [text[-1]]


def test_a_bookmarks_state_takes_gradients(model, prompts):
    done = complete(model, prompts, **GREEDY)
    model(done.bookmark.unread, done.state).logits.sum().backward()
    assert model.lm_head.weight.grad.isfinite().all()


def test_a_prompt_may_follow_a_bookmark(model, prompts):
    first = complete(model, prompts, **GREEDY)
    more = [torch.randint(V, (l,)) for l in (2, 0, 1, 2)]
    then = complete(model, more, state=first.bookmark, **GREEDY)
    whole = [torch.cat(row) for row in zip(prompts, first.tokens, more, strict=True)]
    assert lists(then.tokens) == lists(complete(model, whole, **GREEDY).tokens)


def test_a_bookmark_goes_through_a_file_and_forks(model, prompts, tmp_path):
    first = complete(model, prompts, **GREEDY)
    first.bookmark.save(tmp_path / "place")
    place = Bookmark.load(tmp_path / "place", device=model.device, config=model.config)
    expected = complete(model, state=first.bookmark, **GREEDY)
    assert lists(complete(model, state=place, **GREEDY).tokens) == lists(expected.tokens)
    rows = complete(model, state=place[-1].fork(2), **GREEDY)
    assert lists(rows.tokens) == [expected.tokens[3].tolist()] * 2


@pytest.mark.refuses  # NumPy's numbers are none to who checks annotations
@pytest.mark.parametrize(
    ("index", "rows"),
    [
        (1, [1]), (-1, [3]), (np.int64(2), [2]), (torch.tensor(1), [1]), (slice(1, 3), [1, 2]),
        ([2, 0], [2, 0]), ((3, 1), [3, 1]), (range(2), [0, 1]), (np.array([1, 1]), [1, 1]),
        (torch.tensor([3, 0]), [3, 0]),
    ],
)  # fmt: skip
def test_a_bookmarks_places_are_indexed_like_states(model, prompts, index, rows):
    place = complete(model, prompts, **GREEDY).bookmark
    some = place[index]
    assert len(some) == len(rows)
    for name in ("unread", "recent", "written"):
        assert torch.equal(getattr(some, name), getattr(place, name)[rows])
    assert torch.equal(some.state.layers[0].ssm, place.state.layers[0].ssm[rows])


@pytest.mark.refuses
@pytest.mark.parametrize("index", [4, True, 1.0, torch.tensor(4)])
def test_a_place_that_there_is_not_is_no_index(model, prompts, index):
    with pytest.raises(IndexError, match="of 4 does not exist"):
        complete(model, prompts, **GREEDY).bookmark[index]


def test_a_bookmark_knows_the_tokens_that_were_read_last(model, prompts):
    first = complete(model, prompts, **GREEDY)
    then = complete(model, state=first.bookmark, **GREEDY)
    long = complete(model, torch.randint(V, (1, 400)), **GREEDY)
    whole = [
        torch.cat(row)[:-1] for row in zip(prompts, first.tokens, then.tokens, strict=True)
    ]
    assert lists(then.bookmark.remembered()) == lists(whole)
    assert then.bookmark.written.tolist() == [16] * 4
    assert long.bookmark.recent.shape == (1, 256)
    more = complete(model, prompts, state=then.bookmark, samples=2, max_new_tokens=3)
    assert more.bookmark.written.tolist() == [3] * 8


def test_a_plain_state_is_a_bookmark_with_nothing_unread(model, tmp_path):
    tokens = torch.randint(V, (1, 6))
    model(tokens[:, :4]).state.save(tmp_path / "state")
    place = Bookmark.load(tmp_path / "state", device=model.device)
    done = complete(model, tokens[:, 4:], state=place, **GREEDY)
    assert_close(done.tokens[0][None], generate(model, tokens, **GREEDY)[:, 6:])
    with pytest.raises(ValueError, match="at least one token, got none in row 0"):
        complete(model, state=place, **GREEDY)


@pytest.mark.parametrize(
    "extra",
    [
        {"unread": torch.zeros(1, 2)},
        {"unread": torch.zeros(2, 1, dtype=torch.int64)},
        {"other": torch.zeros(1, 1, dtype=torch.int64)},
        {"recent": torch.zeros(2, 1, dtype=torch.int64)},
        {"written": torch.zeros(1, 1, dtype=torch.int64)},
        {"written": torch.zeros(1)},
    ],
)
def test_files_that_hold_no_bookmark_are_refused(model, tmp_path, extra):
    state = model(torch.randint(V, (1, 6))).state
    write_layers(tmp_path / "place", state.layers, extra)
    with pytest.raises(ValueError, match="must hold a state and its unread tokens alone"):
        Bookmark.load(tmp_path / "place")


def test_a_file_without_the_tokens_that_were_read_is_a_bookmark(model, tmp_path):
    """As version 0.1.0 wrote it."""
    done = complete(model, torch.randint(V, (1, 6)), **GREEDY)
    write_layers(tmp_path / "place", done.state.layers, {"unread": done.bookmark.unread})
    place = Bookmark.load(tmp_path / "place", device=model.device)
    assert (place.recent, place.written) == (None, None)
    place.fork(2)[[1]].save(tmp_path / "again")
    place = Bookmark.load(tmp_path / "again", device=model.device)
    expected = complete(model, state=done.bookmark, **GREEDY)
    got = complete(model, state=place, **GREEDY)
    assert lists(got.tokens) == lists(expected.tokens)
    assert got.bookmark.recent.shape == (1, 8)


def test_reasons_and_texts_of_stop_strings():
    torch.manual_seed(0)
    model = MambaLM(MambaConfig(16, 2, 256, d_state=4, tie_embeddings=False))
    with torch.no_grad():
        model.lm_head.weight.normal_(std=0.1)
    settings = {"max_new_tokens": 30, "tokenizer": ByteTokenizer(), "seed": 4}
    free = complete(model, ["ab", "c"], **settings)
    stop = free.texts[1][3:5]
    pieces = []
    done = complete(
        model, ["ab", "c"], stop=[stop], on_text=lambda *piece: pieces.append(piece), **settings
    )
    assert done.texts == tuple(text.split(stop)[0] for text in free.texts)
    assert done.finish_reasons[1] == "stop_string"
    assert done.finish_reasons[0] == ("stop_string" if stop in free.texts[0] else "length")
    for row in range(2):
        assert "".join(piece for at, piece in pieces if at == row) == done.texts[row]


@pytest.mark.refuses
@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        (None, {}, "prompts must be given, unless a bookmark is, got None"),
        (["a"], {}, "tokenizer must be given with prompts that are texts"),
        ([[1, 2]], {}, r"prompts must all be tensors or all be texts, got \[1, 2\]"),
        ([torch.tensor([1]), "a"], {}, "prompts must all be tensors or all be texts, got 'a'"),
        ([torch.tensor([1.5])], {}, r"int64 or int32 .*got float32 of shape \(1,\)"),
        ([torch.tensor([1]), torch.tensor([V])], {}, rf"in \[0, {V}\), got {V}"),
        ([torch.tensor([], dtype=torch.int64)], {}, "at least one token, got none in row 0"),
        ([torch.tensor([1])], {"samples": 0}, "samples must be a whole number .*, got 0"),
        (
            [torch.tensor([1])],
            {"samples": 2, "temperature": 0},
            "samples must be 1 with temperature 0, where all are equal, got 2",
        ),
        ([torch.tensor([1])], {"stop": ["a"]}, "tokenizer must be given with stop or on_text"),
        ([torch.tensor([1])], {"tokenizer": "byte"}, "tokenizer must be a Tokenizer, got str"),
        ([torch.tensor([1])], {"alternatives": 22}, "alternatives must be at most the 21 ids"),
        ([torch.tensor([1])], {"draft": 3}, "draft must be a MambaLM, got int"),
        ([torch.tensor([1])], {"generator": 3}, r"must be a torch\.Generator or None, got 3"),
        ([torch.tensor([1])], {"logits_processors": None}, "a list of functions, got None"),
        ([torch.tensor([1])], {"logits_processors": len}, "a list of functions, got <built-in"),
        ([torch.tensor([1])], {"logits_processors": [3]}, "a list of functions, got 3"),
        (
            [torch.tensor([1])],
            {"tokenizer": ByteTokenizer(), "on_text": 3},
            "on_text must be a function, got 3",
        ),
    ],
)
def test_bad_input_is_refused(model, prompts, settings, message):
    with pytest.raises(ValueError, match=f"generate: .*{message}"):
        complete(model, prompts, **{"max_new_tokens": 1} | settings)


@pytest.mark.refuses
@pytest.mark.parametrize("use", [generate, complete, beam_search, stream])
def test_what_is_no_model_is_refused(use):
    for other in (3, torch.nn.Linear(2, 2)):
        name = type(other).__name__
        with pytest.raises(ValueError, match=f"generate: model must be a MambaLM, got {name}$"):
            use(other, torch.tensor([[1]]), max_new_tokens=1)


@pytest.mark.refuses
def test_a_bookmark_of_another_number_of_rows_is_refused(model, prompts):
    place = complete(model, prompts, **GREEDY).bookmark
    with pytest.raises(ValueError, match="one sequence for each prompt, 2, got 4"):
        complete(model, prompts[:2], state=place, **GREEDY)
    with pytest.raises(ValueError, match=r"unread must be of shape \(4, u\).*got \(3, 1\)"):
        Bookmark(place.state, place.unread[:3])
    with pytest.raises(ValueError, match=r"written must be of shape \(4,\).*got \(4, 1\)"):
        Bookmark(place.state, place.unread, written=place.unread)


@pytest.mark.refuses
@pytest.mark.parametrize("k", [3, -2, 2.0, "2"])
def test_a_bookmark_forks_as_its_state_does(make_model, k):
    """What the state refuses the bookmark does, by the same sentence."""
    prompts = [torch.tensor([97]), torch.tensor([98])]
    place = complete(make_model(256), prompts, max_new_tokens=1, temperature=0).bookmark
    with pytest.raises((ValueError, TypeError)) as refused:
        place.state.fork(k)
    with pytest.raises(refused.type, match=re.escape(str(refused.value))):
        place.fork(k)
