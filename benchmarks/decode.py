"""One token of the 130M model, beside transformers and the time to read its weights once."""

import copy
import ctypes
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor, nn

from mambakit import MambaLM
from mambakit.generation.cpu_step import CPUStep, rounded

from .floor import build
from .peers import VOCABULARY, pair
from .rows import Check, Row
from .timing import interleave

BATCHES = (1, 8)
FLOOR = "reading the weights"
_PROMPT = 16
_LIMIT = 1e-5
_SOURCE = Path(__file__).with_name("read_rate.c")


def run(rounds: int) -> Iterator[Row]:
    """Yield rows of both models and of the floor, by batch size and dtype of the weights.

    The floor reads as many bytes as a token does, from memory of its own, on all threads. Small
    pages are what memory has unless it asks for others, so the floor has them; the step asks
    for large ones for its copies of weights, and may be faster than the floor.
    """
    ours, peer = (model.eval().requires_grad_(False) for model in pair(use_mambapy=False))
    short = copy.deepcopy(peer).to(torch.bfloat16)
    steps = {
        "fp32": CPUStep(ours),
        "bf16": CPUStep(ours, "bf16"),
        "int8": CPUStep(ours, "int8"),
    }
    checks = {
        "fp32": _check(steps["fp32"], ours, peer),
        "bf16": _check(steps["bf16"], rounded(ours, "bf16")),
        "int8": _check(steps["int8"], rounded(ours, "int8")),
    }
    for b in BATCHES:
        tokens = _prompt(b)[:, 0]
        calls: dict[str, Callable[[], object]] = {}
        for name, step in steps.items():
            calls[f"{name} mambakit"] = _Decoding(step, tokens)
            calls[f"{name} {FLOOR}"] = _Reading(step.nbytes)
        for name, model in (("fp32", peer), ("bf16", short)):
            calls[f"{name} transformers"] = _PeerDecoding(model, tokens)
        times = interleave(calls, rounds=rounds, slice_seconds=0.4, warm_up=2)
        for key, samples in times.items():
            name, subject = key.split(" ", 1)
            yield Row(
                "decode",
                f"130M, batch {b}, {name}",
                subject,
                "s",
                samples,
                tokens=b,
                check=checks[name] if subject == "mambakit" else None,
                note=f"{1e-6 * steps[name].nbytes:.0f} MB" if subject == FLOOR else "",
            )


def _prompt(b: int) -> Tensor:
    chance = torch.Generator().manual_seed(0)
    return torch.randint(VOCABULARY, (b, _PROMPT + 1), generator=chance)


@torch.inference_mode()
def _check(step: CPUStep, same: MambaLM, peer: nn.Module | None = None) -> Check:
    """Compare a token after a prompt with a forward pass over everything."""
    tokens = _prompt(2)
    wanted = same(tokens).logits[:, -1]
    if peer is not None:
        wanted = peer(tokens).logits[:, -1]
    logits, _ = step(tokens[:, -1], same(tokens[:, :-1]).state)
    what = "transformers' logits" if peer is not None else "those of the same rounded weights"
    difference = (logits - wanted).abs().max() / wanted.abs().max()
    return Check(f"difference from {what}", float(difference), _LIMIT)


class _Decoding:
    """One more token of each sequence at each call."""

    def __init__(self, step: CPUStep, tokens: Tensor) -> None:
        self._step, self._tokens, self._state = step, tokens, None

    @torch.inference_mode()
    def __call__(self) -> None:
        _, self._state = self._step(self._tokens, self._state)


class _PeerDecoding:
    def __init__(self, model: nn.Module, tokens: Tensor) -> None:
        self._model, self._tokens, self._cache = model, tokens[:, None], None

    @torch.inference_mode()
    def __call__(self) -> None:
        self._cache = self._model(
            self._tokens, cache_params=self._cache, use_cache=True
        ).cache_params


class _Reading:
    """Read so many bytes once, each thread its own part."""

    def __init__(self, nbytes: int) -> None:
        self._read = build(_SOURCE).read_all
        self._read.argtypes = [ctypes.c_void_p, ctypes.c_int64]
        self._read.restype = ctypes.c_float
        threads = torch.get_num_threads()
        self._parts = [_written(nbytes // threads) for _ in range(threads)]
        self._pool = ThreadPoolExecutor(threads)

    def __call__(self) -> None:
        parts = [(part.data_ptr() + 63 & ~63, part.nbytes - 64) for part in self._parts]
        for done in [self._pool.submit(self._read, *part) for part in parts]:
            done.result()


def _written(nbytes: int) -> Tensor:
    # zeros would be one page of the system's, for as long as nobody writes
    return torch.ones(nbytes, dtype=torch.uint8)
