"""Memory of a thousand forks of one state, before and after some of them have gone on."""

from collections.abc import Iterator

import torch

from mambakit import MambaConfig, MambaLM
from mambakit.models import ModelState

from .memory import resident
from .rows import Check, Row

_FORKS, _WRITTEN = 1000, 50
_MOST = 1.05


def run(rounds: int) -> Iterator[Row]:
    """Yield what states of the 130M model's sizes hold."""
    del rounds
    with torch.inference_mode():
        yield from _measure()


def _measure() -> Iterator[Row]:
    # the vocabulary is no part of a state, and logits of a large one would hide it
    model = MambaLM(MambaConfig(d_model=768, n_layer=24, vocab_size=256))
    tokens = torch.zeros(_WRITTEN, 1, dtype=torch.int64)
    prompt = model(torch.arange(64)[None]).state
    before = resident("VmRSS")
    forks = prompt.fork(_FORKS)
    shared = resident("VmRSS") - before
    written = model(tokens, forks[:_WRITTEN]).state

    def row(subject: str, value: float, check: Check | None = None, note: str = "") -> Row:
        return Row(
            "forks", "a state of the 130M model", subject, "MB", [value], None, check, note
        )

    yield row("of one prompt", _megabytes(prompt))
    own = _megabytes(forks) / _megabytes(prompt)
    yield row(
        f"{_FORKS:,} forks of it",
        _megabytes(forks),
        Check("memory over that of the prompt's state", own, 1.0),
        f"the process grew by {shared / 1e3:.2f} MB",
    )
    each = _megabytes(written) / (_WRITTEN * _megabytes(prompt))
    yield row(
        f"{_WRITTEN} of them a token later",
        _megabytes(written),
        Check("memory over that of so many states", each, _MOST),
        f"the other {_FORKS - _WRITTEN} share the prompt's",
    )


def _megabytes(state: ModelState) -> float:
    return state.nbytes / 1e6
