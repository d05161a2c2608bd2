"""Compare logits, loss and every gradient of the 130M model with transformers' own."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .peers import VOCABULARY, pair, peer_name
from .rows import Check, Row

LENGTH = 128
LIMIT = 1e-5


def run(rounds: int) -> Iterator[Row]:
    """Yield the largest differences, each relative to the largest value of its tensor."""
    del rounds  # the numbers are the same each time
    generator = torch.Generator().manual_seed(1)
    tokens, targets = torch.randint(VOCABULARY, (2, 2, LENGTH), generator=generator)
    ours, peer = pair(use_mambapy=False)
    mine, theirs = _answers(ours, tokens, targets), _answers(peer, tokens, targets)
    groups = {
        "logits": ["logits"],
        "loss": ["loss"],
        "every gradient": [name for name, _ in ours.named_parameters()],
    }
    case = f"130M, batch 2, {LENGTH} tokens, fp32"
    for group, names in groups.items():
        errors = {n: _difference(mine[n], theirs[peer_name(n)]) for n in names}
        worst = max(errors, key=errors.__getitem__)
        yield Row(
            "parity",
            case,
            group,
            "relative difference",
            [errors[worst]],
            check=Check("difference from transformers", errors[worst], LIMIT),
            note=f"{len(names)} tensors, largest at {worst}" if len(names) > 1 else "",
        )


def _answers(model: nn.Module, tokens: Tensor, targets: Tensor) -> dict[str, Tensor]:
    logits = model(tokens).logits
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), "loss": loss.detach(), **gradients}


def _difference(mine: Tensor, theirs: Tensor) -> float:
    return float((mine - theirs).abs().max() / theirs.abs().max())
