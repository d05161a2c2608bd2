"""Measurements survive being written, wrong answers are not timed, pages are current."""

import math

import pytest

from benchmarks import tables
from benchmarks.rows import RESULTS, Check, Row, read, write
from benchmarks.timing import interleave, paired_ratio


def row(subject="fused", samples=(2.0, 1.0, 4.0), **more):
    machine = {"device": "a machine", "threads": 2, "isa": {"mambakit": "avx2"}}
    return Row("scan", "forward", subject, "ms", list(samples), machine=machine, **more)


def test_rows_come_back_as_they_were_written(tmp_path):
    rows = [row(check=Check("difference", 1e-7, 1e-6)), row("mambapy pscan", tokens=2048)]
    write(rows, tmp_path / "scan.jsonl")
    assert read(tmp_path / "scan.jsonl") == rows
    assert [path.name for path in tmp_path.iterdir()] == ["scan.jsonl"]


@pytest.mark.parametrize("error", [2e-6, math.nan])
def test_a_wrong_answer_is_refused(error):
    with pytest.raises(RuntimeError, match="difference must be at most 1e-06, got"):
        Check("difference", error, 1e-6)


def test_candidates_take_turns():
    order = []
    calls = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    times = interleave(calls, rounds=3, slice_seconds=0)
    assert order == ["a", "b"] * 4  # one round warms up
    assert [len(samples) for samples in times.values()] == [3, 3]


def test_a_ratio_pairs_samples_of_the_same_round():
    # The machine slowed down tenfold in the last two rounds; the ratio did not change.
    assert paired_ratio([8.0, 80.0, 80.0], [1.0, 10.0, 10.0]) == 8.0


def test_the_pages_show_the_rows():
    blocks = tables.render(RESULTS)
    for page in tables.PAGES:
        text = page.read_text(encoding="utf-8")
        assert tables.fill(text, blocks) == text, "run python -m benchmarks.tables"
