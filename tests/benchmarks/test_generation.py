"""What the benchmarks of generation check, on models that take no time."""

import numpy as np
import pytest
import torch

from benchmarks import forks, rounding, speculative, trained
from mambakit import MambaConfig, MambaLM
from mambakit.ops import _native

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.skipif(
        _native.unavailable() is not None, reason="rounding needs the CPU library"
    ),
]


@pytest.fixture(autouse=True)
def _little(monkeypatch):
    chance = np.random.default_rng(0)
    parts = [chance.integers(97, 123, size, dtype=np.uint8) for size in (4000, 400)]
    monkeypatch.setattr(trained, "text", lambda: trained.Text(*parts))
    monkeypatch.setattr(trained, "WIDTH", 16)
    monkeypatch.setattr(trained, "TIMES", 2)
    monkeypatch.setattr(trained, "_LENGTH", 16)
    monkeypatch.setattr(speculative, "_NEW", 12)


def test_a_deepened_model_begins_as_the_small_one(monkeypatch):
    small = MambaLM(MambaConfig(16, trained.LAYERS, vocab_size=256))
    monkeypatch.setattr(trained, "learn", lambda model, *_, **__: model)
    deep = trained.deepened(small, trained.text())
    tokens = torch.randint(256, (2, 9))
    torch.testing.assert_close(deep(tokens).logits, small(tokens).logits)
    assert len(deep.backbone.layers) == 2 * trained.LAYERS


def test_learning_lowers_the_loss_on_other_text():
    text = trained.text()
    torch.manual_seed(0)
    model = MambaLM(MambaConfig(16, 1, vocab_size=256))
    before = speculative._bits(model, text)
    assert (
        speculative._bits(trained.learn(model, text, steps=20, rows=4, rate=1e-2), text)
        < before
    )


def test_a_draft_is_measured_beside_the_model_alone():
    rows = list(speculative.run(2))
    kinds = [row.case.rsplit(", ", 1)[1] for row in rows]
    assert kinds == ["greedy"] * 4 + ["sampled"] * 4
    assert [row.subject for row in rows[:2]] == [speculative.PLAIN, "2 tokens at a time"]
    assert all(len(row.samples) == 2 and row.check for row in rows)
    assert "accepted" in rows[1].note


def test_a_draft_that_changes_the_text_is_not_measured(monkeypatch):
    right = speculative.complete

    def err(model, prompts, **settings):
        done = right(model, prompts, **settings)
        if "draft" in settings:
            done.tokens[0][5] += 1
        return done

    monkeypatch.setattr(speculative, "complete", err)
    with pytest.raises(
        RuntimeError, match="tokens other than without a draft must be at most 0"
    ):
        list(speculative.run(1))


def test_rounding_is_scored_beside_fp32():
    rows = list(rounding.run(1))
    assert [row.subject for row in rows] == ["fp32", "bf16", "int8"]
    assert rows[0].check.value == 1


def test_forks_hold_the_prompts_state_once(monkeypatch):
    monkeypatch.setattr(forks, "_WRITTEN", 2)
    one, many, written = (row.median for row in forks.run(1))
    assert many == one
    assert 2 * one <= written <= 2.1 * one
