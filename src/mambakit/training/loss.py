"""Cross-entropy in float32: of logits without a copy of them, of vectors without logits."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mambakit.modules.linear import linear, product_dtype

# Rows of logits worked on at once hold about this many numbers, so that the float32
# temporaries stay in a core's cache rather than doubling the logits in memory.
_BLOCK = 1 << 20


def _blocks(rows: int, vocabulary: int) -> list[slice]:
    size = max(1, _BLOCK // max(1, vocabulary))
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def count_targets(targets: Int[Tensor, "*batch"]) -> Int[Tensor, ""]:
    """Return how many targets are wanted, and at least 1: the mean over none is 0."""
    return (targets >= 0).sum().clamp(min=1)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        normalizers = torch.empty(len(targets), device=logits.device)
        for rows in _blocks(*logits.shape):
            normalizers[rows] = torch.logsumexp(logits[rows].float(), dim=-1)
        count, wanted, targets = count_targets(targets), targets >= 0, targets.clamp(min=0)
        picked = logits.gather(1, targets[:, None])[:, 0].float()
        ctx.save_for_backward(logits, targets, normalizers, wanted, count)
        return (normalizers - picked).masked_fill_(~wanted, 0).sum() / count

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        logits, targets, normalizers, wanted, count = ctx.saved_tensors
        scale = grad / count
        out = torch.empty_like(logits)
        # a pass more over the block, which a CPU can tell to be needless
        some_unwanted = not wanted.is_cpu or not bool(wanted.all())
        for rows in _blocks(*logits.shape):
            # (softmax - one_hot) * scale
            block = torch.sub(logits[rows], normalizers[rows, None]).exp_().mul_(scale)
            hit = (-scale).to(block.dtype).expand(block.shape[0], 1)
            block.scatter_add_(1, targets[rows, None], hit)
            if some_unwanted:
                block.masked_fill_(~wanted[rows, None], 0)
            out[rows] = block
        return out, None


def cross_entropy(
    logits: Float[Tensor, "b l v"], targets: Int[Tensor, "b l"]
) -> Float[Tensor, ""]:
    """Average ``-ln softmax(logits)[target]`` over the steps that have a target, in float32.

    ``torch.nn.functional.cross_entropy`` keeps the log-probabilities, as large as the
    logits, from forward to backward, and before it a float32 copy if the logits are
    bfloat16. This keeps one number a row and makes the gradient block by block.

    Args:
        logits: Scores, in any floating dtype; the gradient has the same one.
        targets: The token that came, int64, below ``v``. Steps whose target is negative, as
            PyTorch's -100, are passed over, whatever their logits.

    Returns:
        The mean in nats, float32; 0 if no step has a target.

    Example:
        >>> logits, targets = torch.randn(2, 3, 5), torch.randint(5, (2, 3))
        >>> targets[0, 1] = -100
        >>> same = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        >>> torch.testing.assert_close(cross_entropy(logits, targets), same)
    """
    loss: Tensor = _CrossEntropy.apply(logits.flatten(0, 1), targets.flatten())
    return loss


# Logits that exist at once while a layer and its loss are computed together: half a gigabyte
# in bfloat16. At a vocabulary of 50,280 that is 4,096 rows, enough for the products' full rate.
_LOGITS = 1 << 28

Score = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def _score(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sum of the losses of rows with a target, and its gradient to the logits."""
    logp = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
    unwanted = targets[:, None] < 0
    nats = -logp.gather(1, targets[:, None].clamp(min=0)).masked_fill(unwanted, 0).sum()
    picked = torch.arange(logits.shape[1], device=logits.device) == targets[:, None]
    dlogits = (logp.exp() - picked.to(torch.float32)).masked_fill(unwanted, 0)
    return nats, dlogits.to(logits.dtype)


@cache
def _compiled_score() -> Score:
    return torch.compile(_score, fullgraph=True)


def _rows_at_once(vocabulary: int) -> int:
    # a power of two, so that no tile of a matrix product is half empty
    return 1 << max(0, (_LOGITS // max(1, vocabulary)).bit_length() - 1)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add ``a @ b`` to ``total``, which may be wider, without rounding the product first."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif total.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:  # PyTorch's CPU products know no wider output
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype, score: Score
    ) -> Tensor:
        rows, vocabulary = len(x), weight.shape[0]
        needs_x, needs_weight, *_ = ctx.needs_input_grad
        loss = torch.zeros((), device=x.device)
        dx = torch.empty_like(x, dtype=dtype) if needs_x else None
        wide = torch.promote_types(weight.dtype, torch.float32)
        dweight = torch.zeros_like(weight, dtype=wide) if needs_weight else None
        with torch.autocast(x.device.type, enabled=False):
            short = weight.to(dtype)
            size = _rows_at_once(vocabulary)
            for some in (slice(start, start + size) for start in range(0, rows, size)):
                part = x[some].to(dtype)
                nats, dlogits = score(part @ short.T, targets[some])
                loss += nats
                if dx is not None:
                    torch.mm(dlogits, short, out=dx[some])
                if dweight is not None:
                    _add_product(dweight, dlogits.T, part)
        count = count_targets(targets)
        ctx.save_for_backward(dx, dweight, count)
        ctx.dtypes = x.dtype, weight.dtype
        return loss / count

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *made, count = ctx.saved_tensors
        scale = grad / count
        dx, dweight = (
            None if t is None else (t * scale).to(dtype)
            for t, dtype in zip(made, ctx.dtypes, strict=True)
        )
        return dx, dweight, None, None, None


def linear_cross_entropy(
    x: Float[Tensor, "b l m"],
    weight: Float[Tensor, "v m"],
    targets: Int[Tensor, "b l"],
    *,
    compiled: bool = False,
) -> Float[Tensor, ""]:
    """Average ``-ln softmax(weight x)[target]`` over steps, and make no logits of a batch.

    The value and the gradients are those of ``cross_entropy(linear(x, weight), targets)``. On
    a GPU some thousand rows are scored at a time, and their gradients to ``x`` and ``weight``
    made at once from the same logits, which are then forgotten; that to ``weight`` is summed in
    at least float32. On a CPU it is that composition: there its products are fast in every
    dtype, and its blocks stay in the cache.

    Args:
        x: Hidden vectors.
        weight: The output layer's matrix; it may be the embedding's. The product has the dtype
            of ``torch.nn.functional.linear``, autocast considered.
        targets: The token that came, int64, below ``v``; steps whose target is negative are
            passed over.
        compiled: Let ``torch.compile`` fuse the softmax with its gradient, on a GPU.

    Returns:
        The mean in nats, float32; 0 if no step has a target.

    Example:
        >>> x, weight = torch.randn(2, 3, 4), torch.randn(5, 4)
        >>> targets = torch.randint(5, (2, 3))
        >>> loss = linear_cross_entropy(x, weight, targets)
        >>> torch.testing.assert_close(loss, cross_entropy(x @ weight.T, targets))
    """
    if x.device.type == "cpu":
        return cross_entropy(linear(x, weight), targets)
    score = _compiled_score() if compiled else _score
    return _without_logits(x, weight, targets, score)


def _without_logits(x: Tensor, weight: Tensor, targets: Tensor, score: Score) -> Tensor:
    if not torch.is_grad_enabled():
        x, weight = x.detach(), weight.detach()
    loss: Tensor = _LinearCrossEntropy.apply(
        x.flatten(0, 1), weight, targets.flatten(), product_dtype(x, weight), score
    )
    return loss
