"""Read 2048 tokens with the 130M model, beside transformers with the same weights."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from mambakit import MambaLM

from .peers import VOCABULARY, pair
from .rows import Check, Row
from .timing import interleave

LENGTH = 2048
_CHECKED_LENGTH = 256
_FP32_LIMIT = 1e-5

Read = Callable[[Tensor], Tensor]


def run(rounds: int) -> Iterator[Row]:
    """Yield a row of each model in fp32, then in bf16."""
    tokens = torch.randint(VOCABULARY, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    ours, peer = (model.eval() for model in pair(use_mambapy=False))
    exact = _reader(peer)(tokens[:, :_CHECKED_LENGTH])
    for dtype, name in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        readers = {
            "mambakit": _reader(ours.to(dtype)),
            "transformers": _reader(peer.to(dtype)),
        }
        errors = {
            subject: float((read(tokens[:, :_CHECKED_LENGTH]) - exact).abs().max())
            / float(exact.abs().max())
            for subject, read in readers.items()
        }
        # In bf16 the two models round in different places: neither is the other's truth, and
        # ours may be no further from fp32 than twice the peer's distance.
        limit = _FP32_LIMIT if dtype == torch.float32 else 2 * errors["transformers"]
        check = Check("difference from transformers' logits in fp32", errors["mambakit"], limit)
        calls = {subject: _Call(read, tokens) for subject, read in readers.items()}
        times = interleave(calls, rounds=rounds, slice_seconds=6)
        for subject, samples in times.items():
            yield Row(
                "prefill",
                f"130M, batch 1, {LENGTH} tokens, {name}",
                subject,
                "s",
                samples,
                tokens=LENGTH,
                check=check if subject == "mambakit" else None,
            )


class _Call:
    def __init__(self, read: Read, tokens: Tensor) -> None:
        self.read, self.tokens = read, tokens

    def __call__(self) -> Tensor:
        return self.read(self.tokens)


def _reader(model: nn.Module) -> Read:
    """Return a function from tokens to the logits after the last one, in float32."""

    @torch.inference_mode()
    def read(tokens: Tensor) -> Tensor:
        if isinstance(model, MambaLM):
            return model(tokens, last_only=True).logits.float()
        return model(tokens, logits_to_keep=1).logits.float()

    return read
