"""Speculative decoding at batch 1: a model of 20 layers, and a draft of 2 layers before it."""

import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch

from mambakit import MambaLM
from mambakit.evaluation import evaluate_tokens
from mambakit.generation import Completions, complete

from . import trained
from .rows import Check, Row

PLAIN = "without a draft"
DRAFT_TOKENS = (2, 4, 8)
_PROMPT, _NEW = 64, 128
_SCORED = 65536


def run(rounds: int) -> Iterator[Row]:
    """Yield rows of greedy and sampled text, without a draft and by tokens proposed at a time.

    Each round continues another prompt, out of files that neither model has learned from.
    """
    text = trained.text()
    draft = trained.small(text)
    model = trained.deepened(draft, text)
    better = _bits(model, text) / _bits(draft, text)
    learned = Check("the model's bits per byte over the draft's", better, 1.0)
    sizes = " with a draft of ".join(f"{_size(one)} parameters" for one in (model, draft))
    starts = torch.linspace(0, len(text.test) - _PROMPT, rounds + 1).long().tolist()
    prompts = [torch.from_numpy(text.test[at : at + _PROMPT].astype(int)) for at in starts]
    for kind, temperature in (("greedy", 0.0), ("sampled", 1.0)):
        seconds: dict[int, list[float]] = {k: [] for k in (0, *DRAFT_TOKENS)}
        accepted: dict[int, list[float]] = {k: [] for k in DRAFT_TOKENS}
        other = 0
        for index, prompt in enumerate(prompts):
            plain: Completions | None = None
            for k, times in seconds.items():
                settings: dict[str, Any] = {"temperature": temperature, "seed": 0}
                if k:
                    settings |= {"draft": draft, "draft_tokens": k}
                start = time.perf_counter()
                done = complete(model, [prompt], max_new_tokens=_NEW, **settings)
                taken = time.perf_counter() - start
                plain = plain or done
                if temperature == 0:
                    other += int((done.tokens[0] != plain.tokens[0]).sum())
                if index:  # the first warms up
                    times.append(taken)
                    if done.acceptance is not None:
                        accepted[k].append(done.acceptance)
        equal = Check("tokens other than without a draft", other, 0)
        for k, times in seconds.items():
            yield Row(
                "speculative",
                f"{sizes}, {kind}",
                f"{k} tokens at a time" if k else PLAIN,
                "s",
                times,
                tokens=_NEW,
                check=equal if temperature == 0 and k else learned,
                note=f"{statistics.mean(accepted[k]):.0%} accepted" if k else "",
            )


def _size(model: MambaLM) -> str:
    return f"{1e-6 * sum(parameter.numel() for parameter in model.parameters()):.1f}M"


def _bits(model: MambaLM, text: trained.Text) -> float:
    return evaluate_tokens(model, text.test[:_SCORED], rows=8).bits_per_byte
