"""Ctrl-C and SIGTERM: finish the step in hand, save, and leave."""

import os
import signal
import threading
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any, Self


class Interrupted(KeyboardInterrupt):
    """A run that was asked to stop has saved itself and stopped."""


class Interrupts:
    """Turn the first SIGINT or SIGTERM inside the block into a request to stop.

    The second one raises ``KeyboardInterrupt`` at once. Outside the main thread, where
    Python delivers no signals, the block changes nothing.

    Attributes:
        requested: Whether a signal has come.
    """

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        # The file descriptor itself: a handler may not enter a print that it interrupted. Who
        # would read it may be gone (the same Ctrl-C ends `2>&1 | tee`): no reason not to save.
        with suppress(OSError):
            os.write(2, b"\nstopping after this step; press Ctrl-C again to stop at once\n")
