"""Models that have learned a little of Python's standard library, which is on every machine."""

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from mambakit import MambaConfig, MambaLM
from mambakit.data import split_by_file, standard_library
from mambakit.training.config import TrainingConfig
from mambakit.training.optimizer import make_optimizer

WIDTH, LAYERS, TIMES = 384, 2, 10
_LENGTH = 256
_HELD_OUT = 0.05


class Text(NamedTuple):
    """Bytes to learn from, and bytes of other files."""

    train: NDArray[np.uint8]
    test: NDArray[np.uint8]


def text() -> Text:
    """Read the standard library."""
    parts = split_by_file(standard_library(), 0.0, _HELD_OUT)
    train, test = (
        np.frombuffer(b"".join(document.read() for document in part), dtype=np.uint8)
        for part in (parts.train, parts.test)
    )
    return Text(train, test)


def small(text: Text) -> MambaLM:
    """Train a model of two layers: about a minute on two cores."""
    torch.manual_seed(0)
    model = MambaLM(MambaConfig(WIDTH, LAYERS, vocab_size=256))
    return learn(model, text, steps=200, rows=8, rate=4e-3)


def deepened(model: MambaLM, text: Text) -> MambaLM:
    """Train a model of ten times the layers, which begins as the given one.

    Its further layers add nothing at first, so that it need not learn anew what the small model
    knows: about a minute on two cores, where from the start it would be hours.
    """
    torch.manual_seed(1)
    deep = MambaLM(MambaConfig(WIDTH, TIMES * LAYERS, vocab_size=256))
    deep.load_state_dict(model.state_dict(), strict=False)
    with torch.no_grad():
        for block in deep.backbone.layers[LAYERS:]:
            block.mixer.out_proj.weight.zero_()
    return learn(deep, text, steps=60, rows=4, rate=1e-3)


def learn(model: MambaLM, text: Text, *, steps: int, rows: int, rate: float) -> MambaLM:
    """Train on random windows; return the model, ready to be asked."""
    optimizer = make_optimizer(model, TrainingConfig(steps=steps))
    chance = np.random.default_rng(0)
    for step in range(steps):
        warmth = min(1.0, 10 * (step + 1) / steps)
        for group in optimizer.param_groups:
            group["lr"] = rate * warmth * (1 + math.cos(math.pi * step / steps)) / 2
        starts = chance.integers(0, len(text.train) - _LENGTH, rows)
        windows = np.stack([text.train[at : at + _LENGTH + 1] for at in starts])
        tokens = torch.from_numpy(windows.astype(np.int64))
        logits = model(tokens[:, :-1]).logits
        F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model.eval().requires_grad_(False)
