"""Laws of batches: targets follow inputs, an epoch is the text, and a place can be kept."""

import re

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings, strategies as st

from mambakit.data import ContinuingBatches, PackedBatches
from mambakit.data.batches import NO_TARGET

KINDS = [PackedBatches, ContinuingBatches]
sizes = st.tuples(st.integers(1, 5), st.integers(1, 7), st.integers(0, 90), st.integers(0, 3))


def make(kind, batch_size, length, extra, seed):
    tokens = np.arange(batch_size * length + 1 + extra, dtype=np.uint16)
    return kind(tokens, batch_size=batch_size, length=length, seed=seed)


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None)
@given(size=sizes)
def test_targets_follow_inputs(kind, size):
    batches = make(kind, *size)
    for _ in range(5):
        inputs, targets, *_ = batches.next()
        assert inputs.shape == targets.shape == size[:2]
        assert inputs.dtype == targets.dtype == torch.int64
        assert (targets == inputs + 1).all()
        assert (inputs[:, 1:] == inputs[:, :-1] + 1).all()


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None)
@given(size=sizes, before=st.integers(0, 30))
def test_a_place_gives_the_same_batches_again(kind, size, before):
    batches = make(kind, *size)
    for _ in range(before):
        batches.next()
    other = make(kind, *size)
    other.load_state_dict(batches.state_dict())
    for _ in range(6):
        expected, got = batches.next(), other.next()
        assert torch.equal(expected.inputs, got.inputs)
        assert expected.fresh == got.fresh


@settings(deadline=None)
@given(size=sizes)
def test_a_packed_epoch_gives_each_window_once(size):
    length, seed = size[1], size[3]
    batches = make(PackedBatches, 1, length, size[2], seed)
    count = size[2] + length  # tokens after the first: every one can be a target
    targets = []
    while batches.state_dict()["epoch"] == 0:
        targets.append(batches.next().targets)
    seen = torch.cat(targets[:-1]).flatten()  # the last one opened the second epoch
    assert len(seen.unique()) == len(seen)
    assert count - len(seen) < 2 * length  # less than a window is left out at either end


def test_packed_epochs_differ_and_the_seed_fixes_them():
    def order(seed):
        batches = make(PackedBatches, 4, 8, 200, seed)
        return torch.stack([batches.next().inputs[:, 0] for _ in range(20)])

    assert torch.equal(order(0), order(0))
    assert not torch.equal(order(0), order(1))
    first, second = order(0)[:7].flatten(), order(0)[7:14].flatten()
    assert set(first.tolist()) != set(second.tolist())


def test_packed_batches_are_always_fresh():
    batches = make(PackedBatches, 2, 4, 10, 0)
    assert all(batches.next().fresh for _ in range(12))


@settings(deadline=None)
@given(size=sizes)
def test_continuing_batches_continue_until_they_are_fresh(size):
    batches = make(ContinuingBatches, *size)
    before = batches.next()
    assert before.fresh
    for _ in range(30):
        batch = batches.next()
        continues = torch.equal(batch.inputs[:, 0], before.targets[:, -1])
        assert continues or batch.fresh
        before = batch


@settings(deadline=None)
@given(size=sizes)
def test_streams_share_no_target(size):
    batches = make(ContinuingBatches, *size)
    targets = [batches.next().targets]
    while not (batch := batches.next()).fresh:
        targets.append(batch.targets)
    seen = torch.cat(targets, dim=1).flatten()
    assert len(seen.unique()) == len(seen)


def test_tokens_are_read_from_disk_when_they_are_needed(tmp_path):
    path = tmp_path / "tokens.bin"
    np.arange(1000, dtype=np.uint16).tofile(path)
    mapped = np.memmap(path, dtype=np.uint16, mode="r")
    batches = PackedBatches(mapped, batch_size=3, length=16, seed=0)
    inputs, targets, *_ = batches.next()
    assert (targets == inputs + 1).all()


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        (
            PackedBatches,
            r"the poem text must hold 2 windows of length 16 .*\(33 tokens\), got 9",
        ),
        (ContinuingBatches, r"must hold 2 streams of length 16 .*\(33 tokens\), got 9"),
    ],
)
def test_a_text_that_is_too_short_is_refused(kind, sentence):
    with pytest.raises(ValueError, match=sentence):
        kind(np.arange(9), batch_size=2, length=16, seed=0, name="poem")


@pytest.mark.refuses
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["batch_size", "length", "seed"])
@pytest.mark.parametrize("value", [-1, 2.5, True, "2", None])
def test_sizes_and_seeds_that_are_no_numbers_of_their_kind_are_refused(kind, name, value):
    sizes = {"batch_size": 1, "length": 4, "seed": 0}
    least = sizes[name] if name == "seed" else 1
    words = f"{name} must be a whole number of at least {least}, got {value!r}"
    with pytest.raises(ValueError, match=f"^{kind.__name__}: {re.escape(words)}$"):
        kind(np.arange(9), **sizes | {name: value})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["batch_size", "length"])
def test_sizes_below_one_are_refused(kind, name):
    with pytest.raises(ValueError, match=f"{name} must be .* at least 1, got 0"):
        kind(np.arange(9), **{"batch_size": 1, "length": 4, "seed": 0} | {name: 0})


@pytest.mark.refuses
@pytest.mark.parametrize("kind", KINDS)
def test_numbers_of_numpy_will_do(kind):
    sizes = {"batch_size": np.uint8(2), "length": np.uint8(200), "seed": np.int32(3)}
    assert kind(np.arange(999), **sizes).next().inputs.shape == (2, 200)


@pytest.mark.refuses
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "place",
    [
        {},
        {"epoch": 0},
        {"epoch": -1, "position": 0},
        {"epoch": 0, "position": 10**9},
        {"epoch": "0", "position": 0},
        {"epoch": 0, "position": 1.5},
        3,
    ],
)
def test_a_place_that_is_none_is_refused(kind, place):
    batches = kind(np.arange(100), batch_size=2, length=8, seed=0)
    with pytest.raises(ValueError, match=f"{kind.__name__}: a place must"):
        batches.load_state_dict(place)


@st.composite
def texts_of_documents(draw):
    """Boundaries of a few documents, some of them empty, with sizes of batches for them."""
    ends = np.cumsum(draw(st.lists(st.integers(0, 9), min_size=1, max_size=12)))
    batch_size, length = draw(st.integers(1, 3)), draw(st.integers(1, 7))
    count = max(int(ends[-1]), batch_size * length + 1)
    documents = np.array([0, *ends[:-1], count], dtype=np.int64)
    assume(np.any(np.diff(documents) > 1))
    return documents, batch_size, length


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None)
@given(text=texts_of_documents(), seed=st.integers(0, 3))
def test_documents_are_told_apart(kind, text, seed):
    documents, batch_size, length = text
    size = {"batch_size": batch_size, "length": length, "seed": seed}
    tokens = np.arange(documents[-1])
    told, plain = kind(tokens, **size, documents=documents), kind(tokens, **size)
    for _ in range(5):
        inputs, targets, fresh, starts = told.next()
        expected = plain.next()
        assert torch.equal(inputs, expected.inputs)
        assert (fresh, expected.starts) == (expected.fresh, None)
        # each token is its own place in the text
        assert torch.equal(starts, torch.isin(inputs, torch.from_numpy(documents)))
        wanted = targets != NO_TARGET
        assert torch.equal(wanted, ~torch.isin(inputs + 1, torch.from_numpy(documents)))
        assert torch.equal(targets[wanted], expected.targets[wanted])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("documents", [[0, 99], [1, 100], [0, 60, 50, 100], []])
def test_boundaries_of_another_text_are_refused(kind, documents):
    documents = np.array(documents, dtype=np.int64)
    with pytest.raises(
        ValueError, match=f"{kind.__name__}: documents must be .* 0 to 100, the"
    ):
        kind(np.arange(100), batch_size=2, length=8, seed=0, documents=documents)


@pytest.mark.parametrize("kind", KINDS)
def test_documents_without_a_target_are_refused(kind):
    sizes, single = {"batch_size": 2, "length": 8, "seed": 0}, np.arange(101)
    with pytest.raises(ValueError, match=r"documents must .* got none in the held"):
        kind(np.arange(100), **sizes, name="held", documents=single)
