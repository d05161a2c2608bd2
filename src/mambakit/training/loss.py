"""Cross-entropy in float32 that keeps no second copy of the logits."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

# Rows of logits worked on at once hold about this many numbers, so that the float32
# temporaries stay in a core's cache rather than doubling the logits in memory.
_BLOCK = 1 << 20


def _blocks(rows: int, vocabulary: int) -> list[slice]:
    size = max(1, _BLOCK // max(1, vocabulary))
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        normalizers = torch.empty(len(targets), device=logits.device)
        for rows in _blocks(*logits.shape):
            normalizers[rows] = torch.logsumexp(logits[rows].float(), dim=-1)
        picked = logits.gather(1, targets[:, None])[:, 0].float()
        ctx.save_for_backward(logits, targets, normalizers)
        return (normalizers - picked).mean()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        logits, targets, normalizers = ctx.saved_tensors
        scale = grad / len(targets)
        out = torch.empty_like(logits)
        for rows in _blocks(*logits.shape):
            # (softmax - one_hot) * scale
            block = torch.sub(logits[rows], normalizers[rows, None]).exp_().mul_(scale)
            block.scatter_add_(1, targets[rows, None], (-scale).expand(block.shape[0], 1))
            out[rows] = block
        return out, None


def cross_entropy(
    logits: Float[Tensor, "b l v"], targets: Int[Tensor, "b l"]
) -> Float[Tensor, ""]:
    """Average ``-ln softmax(logits)[target]`` over all steps, in float32.

    ``torch.nn.functional.cross_entropy`` keeps the log-probabilities, as large as the
    logits, from forward to backward, and before it a float32 copy if the logits are
    bfloat16. This keeps one number a row and makes the gradient block by block.

    Args:
        logits: Scores, in any floating dtype; the gradient has the same one.
        targets: The token that came, int64, in ``0 <= target < v``.

    Returns:
        The mean in nats, float32.

    Example:
        >>> logits, targets = torch.randn(2, 3, 5), torch.randint(5, (2, 3))
        >>> same = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        >>> torch.testing.assert_close(cross_entropy(logits, targets), same)
    """
    loss: Tensor = _CrossEntropy.apply(logits.flatten(0, 1), targets.flatten())
    return loss
