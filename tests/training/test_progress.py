"""Laws of what a person sees: a bar on a terminal, lines elsewhere, with the same figures."""

import io
import sys

import pytest

from mambakit.training import progress as module
from mambakit.training.progress import Progress, format_seconds


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_without_a_terminal_there_is_a_line_now_and_then(monkeypatch):
    clock = iter(range(0, 1000, 4))  # every look at the clock is 4 seconds later
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    said = []
    progress = Progress(steps=10, done=0, tokens_per_step=100, say=said.append)
    for step in range(1, 11):
        progress.update(step, 2.0, 2.885)
    progress.close()
    assert [line.split(":")[0] for line in said] == [f"step {s}/10" for s in (3, 6, 9, 10)]
    assert said[0] == "step 3/10: loss 2.000, 2.885 bits/byte, 25 tokens/s, 28 s left"


def test_time_spent_elsewhere_does_not_count(monkeypatch):
    clock = iter([0, 50])
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    said = []
    progress = Progress(steps=10, done=4, tokens_per_step=100, say=said.append)
    progress.paused(40)
    progress.update(9, 2.0, 2.885)
    assert "50 tokens/s, 2 s left" in said[0]


def test_on_a_terminal_there_is_a_bar(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    said = []
    progress = Progress(steps=4, done=1, tokens_per_step=100, say=said.append)
    for step in range(2, 5):
        progress.update(step, 2.0, 2.885)
    progress.say("a line of its own")
    progress.close()
    assert "4/4" in terminal.getvalue()
    assert "2.885 bits/byte" in terminal.getvalue()
    assert said == ["a line of its own"]


def test_on_a_terminal_without_width_there_are_lines(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr(Terminal, "fileno", lambda self: 2, raising=False)
    monkeypatch.setattr(
        module.os, "get_terminal_size", lambda _: module.os.terminal_size((0, 0))
    )
    said = []
    progress = Progress(steps=1, done=0, tokens_per_step=100, say=said.append)
    progress.update(1, 2.0, 2.885)
    progress.close()
    assert said[0].startswith("step 1/1: loss 2.000")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.6, "1 min 0 s"), (3599.9, "1 h 0 min"), (90_000, "25 h 0 min")],
)
def test_durations_are_written_for_people(seconds, text):
    assert format_seconds(seconds) == text
