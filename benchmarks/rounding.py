"""What rounding the weights costs: perplexity of a trained model on files it has not seen."""

from collections.abc import Iterator
from typing import get_args

from mambakit.evaluation import evaluate_tokens
from mambakit.generation.cpu_step import Weights, rounded

from . import trained
from .rows import Check, Row

_SCORED = 262144
_MOST = 1.01


def run(rounds: int) -> Iterator[Row]:
    """Yield the perplexity with the weights as they are, and with all matrices rounded."""
    del rounds  # a perplexity has no noise
    text = trained.text()
    model = trained.small(text)
    scored = text.test[:_SCORED]
    models = {"fp32": model} | {name: rounded(model, name) for name in get_args(Weights)}
    scores = {name: evaluate_tokens(one, scored, rows=8) for name, one in models.items()}
    least = scores["fp32"].perplexity
    count = sum(parameter.numel() for parameter in model.parameters())
    for name, score in scores.items():
        yield Row(
            "rounding",
            f"{count:,} parameters, {score.tokens:,} bytes of files not trained on",
            name,
            "perplexity",
            [score.perplexity],
            check=Check("perplexity over that in fp32", score.perplexity / least, _MOST),
            note=f"{score.bits_per_byte:.4f} bits/byte",
        )
