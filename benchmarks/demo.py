"""Run the demo: learn Python's standard library for five minutes, beside ``xz -9``."""

import lzma
import tempfile
from collections.abc import Iterator
from pathlib import Path

from mambakit.evaluation import evaluate_tokens
from mambakit.training.corpus import find_splits

from .recipe import reach
from .rows import Row


def run(rounds: int) -> Iterator[Row]:
    """Yield bits per byte on the test part for the model and for xz, and the speed."""
    del rounds  # minutes each: once is what we pay
    with tempfile.TemporaryDirectory() as name:
        reached = reach("demo.toml", Path(name) / "run")
    data = b"".join(d.read() for d in find_splits(reached.run.config.data).test)
    score = evaluate_tokens(reached.run.model, reached.run.tokenizer.encode(data))
    case = f"the demo, {reached.parameters:,} parameters"
    yield Row(
        "demo",
        case,
        "test part",
        "bits/byte",
        [score.bits_per_byte],
        note=f"{len(data):,} bytes of files not trained on",
    )
    yield Row(
        "demo",
        case,
        "xz -9 on it",
        "bits/byte",
        [8 * len(lzma.compress(data, preset=9)) / len(data)],
        note="xz has no training text",
    )
    yield Row(
        "demo", case, "speed", "bytes/s", [reached.tokens_per_second],
        note=f"{reached.training_seconds:.0f} s of training, {reached.seconds:.0f} s from "
        "the command's start to its end",
    )  # fmt: skip
