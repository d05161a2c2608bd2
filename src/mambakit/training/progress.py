"""What a person sees while a run goes on: a bar on a terminal, else a line now and then."""

import os
import sys
import time
from collections.abc import Callable

from tqdm import tqdm

_LINE_EVERY = 10.0  # seconds between lines where there is no terminal
_MEMORY = 0.9  # of the running loss: one step's alone jumps too much to be read


def format_seconds(seconds: float) -> str:
    """Write a duration for people.

    Example:
        >>> format_seconds(42), format_seconds(312), format_seconds(7380)
        ('42 s', '5 min 12 s', '2 h 3 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def count(number: int, thing: str) -> str:
    """Write a number of things.

    Example:
        >>> count(1, "file"), count(1200, "file")
        ('1 file', '1,200 files')
    """
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


class Progress:
    """Show the running loss, bits per byte, tokens per second and the time left.

    Args:
        steps: Updates in the whole run.
        done: Updates made before this process began.
        tokens_per_step: Tokens in one update.
        say: Where lines go that must not break the bar.
    """

    def __init__(
        self, *, steps: int, done: int, tokens_per_step: int, say: Callable[[str], None]
    ) -> None:
        self._steps, self._first, self._tokens_per_step = steps, done, tokens_per_step
        self._say = say
        self._bar = (
            tqdm(
                total=steps,
                initial=done,
                unit="step",
                dynamic_ncols=True,
                bar_format="{percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt}{postfix}",
            )
            if _shows_bars()
            else None
        )
        self._last_line = self._began = time.monotonic()
        self._loss: float | None = None
        self._elsewhere = 0.0  # seconds spent on validation and saving

    def paused(self, seconds: float) -> None:
        """Leave ``seconds`` out of the speed: they were not spent on training."""
        self._elsewhere += seconds

    def update(self, step: int, loss: float, bits_per_byte: float) -> None:
        """Show that update ``step``, counted from 1, is done."""
        bits = bits_per_byte / loss if loss else 0.0  # bits for each byte of one nat a token
        before = loss if self._loss is None else self._loss
        self._loss = _MEMORY * before + (1 - _MEMORY) * loss
        now = time.monotonic()
        due = now - self._last_line >= _LINE_EVERY or step == self._steps
        if self._bar is None and not due:
            return
        spent = max(now - self._began - self._elsewhere, 1e-9)
        speed = (step - self._first) / spent
        figures = (
            f"loss {self._loss:.3f}, {self._loss * bits:.3f} bits/byte, "
            f"{speed * self._tokens_per_step:,.0f} tokens/s, "
            f"{format_seconds((self._steps - step) / speed)} left"
        )
        if self._bar is not None:
            self._bar.set_postfix_str(figures, refresh=False)
            self._bar.update(step - self._bar.n)
        else:
            self._last_line = now
            self._say(f"step {step}/{self._steps}: {figures}")

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        if self._bar is None:
            self._say(line)
        else:
            with tqdm.external_write_mode():
                self._say(line)

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.close()


def _shows_bars() -> bool:
    """Say whether there is a terminal with room: those of some containers have no width."""
    if sys.stderr is None or not sys.stderr.isatty():
        return False
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns > 0
    except OSError:  # it does not tell
        return True
