"""One token of a Llama with a full cache: the plainest step that is fast on a GPU.

Queries, keys and values come from one product, and so do gate and up; attention is PyTorch's,
by cuDNN on a GPU, over all of a cache of fixed length; what lies between is compiled.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

HEAD = 64
EPS = 1e-6
THETA = 10000.0


class Shape(NamedTuple):
    """A model's sizes."""

    width: int
    layers: int
    hidden: int
    vocabulary: int


class Layer(NamedTuple):
    """The weights of a layer; rows of ``qkv`` and ``gate_up`` one after the other."""

    attention_gain: Tensor
    qkv: Tensor
    out: Tensor
    mlp_gain: Tensor
    gate_up: Tensor
    down: Tensor


class LlamaStep:
    """Read one token of each of ``b`` sequences, the last of ``length`` that the cache holds.

    Args:
        shape: The sizes.
        b: Sequences.
        length: Entries of the cache.
        device: Where.
        dtype: Of weights and cache.
        compile: Whether what lies between the attentions is compiled.
    """

    def __init__(
        self,
        shape: Shape,
        b: int,
        length: int,
        *,
        device: str,
        dtype: torch.dtype,
        compile: bool = True,
    ) -> None:
        self._made: dict[str, Any] = {"device": device, "dtype": dtype}
        m, hidden = shape.width, shape.hidden
        self.embedding = self._draw(shape.vocabulary, m)
        self.gain = torch.ones(m, **self._made)
        self.layers = [
            Layer(
                torch.ones(m, **self._made),
                self._draw(3 * m, m),
                self._draw(m, m),
                torch.ones(m, **self._made),
                self._draw(2 * hidden, m),
                self._draw(m, hidden),
            )
            for _ in range(shape.layers)
        ]
        heads = m // HEAD
        size = (b, heads, length, HEAD)
        self.caches = [
            (torch.randn(size, **self._made), torch.randn(size, **self._made))
            for _ in range(shape.layers)
        ]
        self._place = torch.tensor([length - 1], device=device)
        self._cos, self._sin = _rotation(length - 1, device)
        self._around: Callable[..., Any] = torch.compile(_around) if compile else _around
        self._backend = SDPBackend.CUDNN_ATTENTION if device == "cuda" else SDPBackend.MATH

    def _draw(self, rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, **self._made).mul_(columns**-0.5)

    @property
    def nbytes(self) -> int:
        """Bytes that a token reads: weights and cache."""
        weights = sum(t.nbytes for layer in self.layers for t in layer)
        caches = sum(t.nbytes for pair in self.caches for t in pair)
        return weights + caches + self.embedding.nbytes + self.gain.nbytes

    @torch.inference_mode()
    def __call__(self, tokens: Tensor) -> Tensor:
        """Return the logits (b, v); tokens are (b,)."""
        x, mixed, before = F.embedding(tokens, self.embedding), None, None
        for layer, (keys, values) in zip(self.layers, self.caches, strict=True):
            x, q, k, v = self._around(x, mixed, before, layer, self._cos, self._sin)
            keys.index_copy_(2, self._place, k)
            values.index_copy_(2, self._place, v)
            with sdpa_kernel(self._backend):
                mixed = F.scaled_dot_product_attention(q, keys, values)
            before = layer
        x, *_ = self._around(x, mixed, before, None, self._cos, self._sin)
        return F.linear(F.rms_norm(x, (x.shape[-1],), self.gain, EPS), self.embedding)


def _around(
    x: Tensor,
    mixed: Tensor | None,
    before: Layer | None,
    after: Layer | None,
    cos: Tensor,
    sin: Tensor,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Compute what lies between one layer's attention and the next one's."""
    b, m = x.shape
    if before is not None and mixed is not None:
        x = x + F.linear(mixed.transpose(1, 2).reshape(b, m), before.out)
        h = F.rms_norm(x, (m,), before.mlp_gain, EPS)
        gate, up = F.linear(h, before.gate_up).chunk(2, dim=-1)
        x = x + F.linear(F.silu(gate) * up, before.down)
    if after is None:
        return x, None, None, None
    h = F.rms_norm(x, (m,), after.attention_gain, EPS)
    q, k, v = F.linear(h, after.qkv).view(b, 3, m // HEAD, 1, HEAD).unbind(1)
    return x, _rotate(q, cos, sin), _rotate(k, cos, sin), v


def _rotation(position: int, device: str) -> tuple[Tensor, Tensor]:
    frequencies = THETA ** (-torch.arange(0, HEAD, 2, device=device) / HEAD)
    angle = torch.cat([position * frequencies] * 2)
    return angle.cos(), angle.sin()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-high, low], dim=-1) * sin).to(x.dtype)


def parameters(shape: Shape) -> int:
    """Return how many parameters such a model has."""
    m = shape.width
    return shape.layers * (4 * m * m + 3 * m * shape.hidden) + shape.vocabulary * m


def shape_like(width: int, layers: int, vocabulary: int) -> Shape:
    """Return the Llama of the same width and about the size of a Mamba of so many layers."""
    hidden = 256 * math.ceil(8 * width / 3 / 256)
    return Shape(width, layers // 2, hidden, vocabulary)
