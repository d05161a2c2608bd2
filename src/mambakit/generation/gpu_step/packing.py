"""A model's parameters as the kernels of a step read them."""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mambakit.models import MambaLM

from ..cpu_step import Weights

# Rows of a matrix are copied in pieces of 16 bytes, which are this many int8.
PADDING = 16

_SHORT = (torch.bfloat16, torch.float16)


class Matrix(NamedTuple):
    """Rows of weights, padded to a whole number of pieces; int8 ones have a scale for each."""

    weights: Tensor
    scales: Tensor | None

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return self.weights.shape[0]

    @property
    def columns(self) -> int:
        """How many columns there are in memory."""
        return self.weights.shape[1]


class Layer(NamedTuple):
    """The parameters of one layer; vectors are float32, ``None`` where the model has none."""

    gain: Tensor
    eps: float
    in_proj: Matrix
    in_bias: Tensor | None
    conv: Tensor
    conv_bias: Tensor | None
    x_proj: Matrix
    dt_proj: Matrix
    dt_bias: Tensor
    A: Tensor
    D: Tensor
    out_proj: Matrix
    out_bias: Tensor | None


class PackedModel:
    """What a step reads of a model, and the tensors that hold it.

    Matrices that have the wanted dtype and width already are read where they are; everything
    else is a copy of the parameters as they were.

    Attributes:
        dtype: Dtype of the model, of its embedding and of what its convolutions remember.
        storage: Dtype of the matrices.
        factor: Dtype of the vectors that matrices multiply.
    """

    def __init__(self, model: MambaLM, weights: Weights | None) -> None:
        config = model.config
        blocks: list[Any] = list(model.backbone.layers)
        mixer, norm = blocks[0].mixer, model.backbone.norm_f
        self.dtype = model.lm_head.weight.dtype
        self.storage = storage(model, weights)
        self.factor = factor(self.dtype, self.storage)
        self.n_layer = config.n_layer
        self.m, self.d = config.d_model, config.d_inner
        self.n, self.r, self.w = mixer.d_state, mixer.dt_rank, config.d_conv
        self.selection_eps: float = mixer.selection_norm_eps or 0.0
        self.vocab_size, self.embedding = config.vocab_size, _own(model.backbone.embedding)
        self.layers = [self._layer(block) for block in blocks]
        self.gain, self.eps = _floats(norm.weight), norm.eps
        self.head = pack(model.lm_head.weight, self.storage)

    def _layer(self, block: Any) -> Layer:
        mixer = block.mixer
        return Layer(
            gain=_floats(block.norm.weight),
            eps=block.norm.eps,
            in_proj=pack(mixer.in_proj.weight, self.storage),
            in_bias=_optional(mixer.in_proj.bias),
            conv=_floats(mixer.conv1d.weight.squeeze(1).T),
            conv_bias=_optional(mixer.conv1d.bias),
            x_proj=pack(mixer.x_proj.weight, self.storage),
            dt_proj=pack(mixer.dt_proj.weight, self.storage),
            dt_bias=_floats(mixer.dt_proj.bias),
            A=_floats(-torch.exp(mixer.A_log.detach()) / math.log(2)),
            D=_floats(mixer.D),
            out_proj=pack(mixer.out_proj.weight, self.storage),
            out_bias=_optional(mixer.out_proj.bias),
        )

    @property
    def nbytes(self) -> int:
        """Bytes of parameters that one token reads."""
        held: dict[int, Tensor] = {}
        for part in (*self.layers, (self.gain, self.head)):
            for value in part:
                tensors = value if isinstance(value, Matrix) else (value,)
                held |= {t.data_ptr(): t for t in tensors if isinstance(t, Tensor)}
        return sum(tensor.nbytes for tensor in held.values())


def storage(model: MambaLM, weights: Weights | None) -> torch.dtype:
    """Return the dtype of the matrices that a token reads."""
    if weights is None:
        return model.lm_head.weight.dtype
    return {"bf16": torch.bfloat16, "int8": torch.int8}[weights]


def factor(dtype: torch.dtype, storage: torch.dtype) -> torch.dtype:
    """Return the dtype of vectors that tensor cores multiply by such matrices.

    It is that of the matrices; for int8 ones, which are exact in either, the model's own, and
    bfloat16 for a float32 model's, for its range.

    Example:
        >>> factor(torch.float32, torch.int8)
        torch.bfloat16
    """
    if storage != torch.int8:
        return storage
    return dtype if dtype in _SHORT else torch.bfloat16


def pack(matrix: Tensor, dtype: torch.dtype) -> Matrix:
    """Return a matrix in a dtype, its rows padded with zeros.

    int8 weights are whole numbers from -127 to 127 times the row's largest size over 127, as on
    a CPU. A row that is not finite gets the scale NaN.

    Example:
        >>> packed = pack(torch.tensor([[1.0, -0.5]]), torch.int8)
        >>> packed.weights[0, :2], packed.columns
        (tensor([127, -64], dtype=torch.int8), 16)
    """
    source, scales = matrix.detach(), None
    if dtype == torch.int8:
        wide = source.float()
        largest = wide.abs().amax(dim=1, keepdim=True)
        usable = largest.isfinite() & (largest > 0)
        scales = torch.where(largest.isfinite(), largest / 127, torch.nan)[:, 0].contiguous()
        whole = (wide * torch.where(usable, 127 / largest, 0)).nan_to_num(0).round()
        source = whole.to(torch.int8)
    source = source.to(dtype)
    missing = -source.shape[1] % PADDING
    if missing or not source.is_contiguous() or source.data_ptr() % 16:
        source = F.pad(source, (0, missing)).contiguous()
    return Matrix(source, scales)


def _own(embedding: Any) -> Tensor:
    return embedding.weight.detach().contiguous()


def _floats(tensor: Tensor) -> Tensor:
    """Return a float32 copy, which no change of a parameter reaches half-way."""
    return tensor.detach().to(torch.float32, copy=True).contiguous()


def _optional(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else _floats(tensor)
