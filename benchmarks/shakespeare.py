"""Train a character-level model of tiny Shakespeare for five minutes."""

import gzip
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F

from mambakit.models import MambaLM

from .recipe import reach
from .rows import Check, Row

_PARAMETERS, _LOSS, _MINUTES = 900_000, 1.70, 5
_WINDOW = 256


def run(rounds: int, text: Path) -> Iterator[Row]:
    """Yield the validation loss, in two ways of reading, and the time it took."""
    del rounds  # minutes each: once is what we pay
    with tempfile.TemporaryDirectory() as name:
        folder, file = Path(name) / "run", Path(name) / "input.txt"
        data = text.read_bytes()
        file.write_bytes(gzip.decompress(data) if text.suffix == ".gz" else data)
        reached = reach("shakespeare.toml", folder, [f"data.files={file}"])
        characters = file.read_text(encoding="utf-8")
    held_out = characters[len(characters) - len(characters) // 10 :]
    tokens = torch.as_tensor(reached.run.tokenizer.encode(held_out)).long()
    case = f"tiny Shakespeare, {reached.parameters:,} parameters"
    yield Row(
        "shakespeare",
        case,
        "validation loss",
        "nats/character",
        [reached.validation_loss],
        check=Check("validation loss", reached.validation_loss, _LOSS),
        note="the last 10 % of the text, read from end to end with the state carried",
    )
    yield Row(
        "shakespeare",
        case,
        f"the same in windows of {_WINDOW}",
        "nats/character",
        [_loss_in_windows(reached.run.model, tokens)],
        check=Check("parameters", reached.parameters, _PARAMETERS),
        note="each window read without what came before it",
    )
    yield Row(
        "shakespeare",
        case,
        "training",
        "s",
        [reached.training_seconds],
        check=Check("seconds of training", reached.training_seconds, 60 * _MINUTES * 1.02),
        note=f"{reached.tokens_per_second:,.0f} characters/s; {reached.seconds:.0f} s from "
        "the command's start to its end",
    )


@torch.inference_mode()
def _loss_in_windows(model: MambaLM, tokens: torch.Tensor) -> float:
    count = (len(tokens) - 1) // _WINDOW
    inputs = tokens[: count * _WINDOW].view(count, _WINDOW)
    targets = tokens[1 : count * _WINDOW + 1].view(count, _WINDOW)
    nats = 0.0
    for x, y in zip(inputs.split(16), targets.split(16), strict=True):
        logits = model(x).logits.flatten(0, 1)
        nats += F.cross_entropy(logits, y.flatten(), reduction="sum").item()
    return nats / (count * _WINDOW)
