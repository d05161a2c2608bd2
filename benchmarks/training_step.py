"""One training step of the 130M model, beside transformers with mamba.py's parallel scan.

transformers' default scan is left out: its backward is quadratic in the length and takes about
half an hour for this one step.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambakit import MambaLM
from mambakit.training.loss import cross_entropy

from .peers import VOCABULARY, pair
from .rows import Check, Row
from .timing import interleave

LENGTH = 1024
_LIMITS = {"fp32": 1e-5, "bf16": 2e-3}


def run(rounds: int) -> Iterator[Row]:
    """Yield a row of each model in fp32, then under bf16 autocast, and the scan's share."""
    generator = torch.Generator().manual_seed(0)
    tokens, targets = torch.randint(VOCABULARY, (2, 1, LENGTH), generator=generator)
    for precision in ("fp32", "bf16"):
        ours, peer = pair(use_mambapy=True)
        steps = {
            "mambakit": Step(ours, tokens, targets, precision),
            "transformers, use_mambapy": Step(peer, tokens, targets, precision),
        }
        losses = [step.loss(256) for step in steps.values()]
        check = Check(
            "difference from transformers' loss",
            abs(losses[0] - losses[1]) / losses[1],
            _LIMITS[precision],
        )
        # A short step first creates the optimizer's state and warms the libraries up.
        for step in steps.values():
            step(64)
        times = interleave(steps, rounds=rounds, slice_seconds=15, warm_up=0)
        case = f"130M, batch 1, {LENGTH} tokens, " + (
            "fp32" if precision == "fp32" else "bf16 autocast"
        )
        for subject, samples in times.items():
            yield Row(
                "training step",
                case,
                subject,
                "s",
                samples,
                tokens=LENGTH,
                check=check if subject == "mambakit" else None,
            )
        shares = [_scan_share(steps["mambakit"]) for _ in range(3)]
        yield Row("training step", case, "scan's share of the step", "%", shares)


class Step:
    """Forward, loss, backward and AdamW on one sequence.

    AdamW runs in its fused form for either model: it is what our trainer and transformers' own
    choose. Our model has our loss, the peer PyTorch's.
    """

    def __init__(
        self, model: nn.Module, tokens: Tensor, targets: Tensor, precision: str
    ) -> None:
        self.model = model.train()
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        self.tokens, self.targets = tokens, targets
        self.autocast = precision == "bf16"

    def __call__(self, length: int = LENGTH) -> None:
        self._loss(length).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def loss(self, length: int) -> float:
        return self._loss(length).item()

    def _loss(self, length: int) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            logits = self.model(self.tokens[:, :length]).logits
        targets = self.targets[:, :length]
        if isinstance(self.model, MambaLM):
            return cross_entropy(logits, targets)
        return F.cross_entropy(logits[0].float(), targets[0])


def _scan_share(step: Step) -> float:
    """Return the per cent of the step's own time that the scan takes, forward and backward."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    times = {event.key: event.self_cpu_time_total for event in profile.key_averages()}
    scan = sum(t for name, t in times.items() if name.startswith("mambakit::selective_scan"))
    if scan == 0:
        raise RuntimeError("training step: the profile must show mambakit::selective_scan")
    return 100 * scan / sum(times.values())
