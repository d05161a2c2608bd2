"""A model's parameters in the form in which the step streams them."""

import copy
import ctypes
import dataclasses
import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from mambakit.models import MambaLM

from .library import STORAGE_CODES, StepLayer, StepLibrary, StepMatrix, StepModel, step_library

Weights = Literal["bf16", "int8"]

_LINE = 64  # bytes: matrices start on cache lines


class _Matrix(NamedTuple):
    """Rows of weights; int8 ones have a scale for each row."""

    weights: Tensor
    scales: Tensor | None

    def values(self) -> Tensor:
        """Return the numbers that the weights stand for, in float32."""
        wide = self.weights.float()
        return wide if self.scales is None else wide * self.scales[:, None]


class _Memory:
    """One piece of memory on large pages, for all copies of matrices."""

    def __init__(self, library: StepLibrary, nbytes: int) -> None:
        self._memory = torch.empty(nbytes, dtype=torch.uint8)
        library.large_pages(self._memory)
        self._used = -self._memory.data_ptr() % _LINE

    def take(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        start, nbytes = self._used, shape.numel() * dtype.itemsize
        self._used += math.ceil(nbytes / _LINE) * _LINE
        return self._memory[start : start + nbytes].view(dtype).view(shape)


class _Packer:
    """Turn matrices into one storage: in place where they have it already."""

    def __init__(self, library: StepLibrary, dtype: torch.dtype, matrices: list[Tensor]):
        self._library, self._dtype = library, dtype
        sizes = [m.numel() * dtype.itemsize + _LINE for m in matrices if not self._fits(m)]
        self._memory = _Memory(library, sum(sizes) + _LINE)

    def _fits(self, matrix: Tensor) -> bool:
        return matrix.dtype == self._dtype and matrix.is_contiguous()

    def pack(self, matrix: Tensor) -> _Matrix:
        if self._fits(matrix):
            return _Matrix(matrix, None)
        return self._copy(matrix, self._memory.take(matrix.shape, self._dtype))

    def pack_transposed(self, matrix: Tensor) -> _Matrix:
        """Return the transpose, with the scales of the rows that it had."""
        packed = self._copy(matrix, torch.empty(matrix.shape, dtype=self._dtype))
        return _Matrix(packed.weights.T.contiguous(), packed.scales)

    def _copy(self, matrix: Tensor, to: Tensor) -> _Matrix:
        if self._dtype != torch.int8:
            return _Matrix(to.copy_(matrix), None)
        scales = torch.empty(matrix.shape[0])
        self._library.quantise(matrix.float().contiguous(), to, scales)
        return _Matrix(to, scales)


class PackedModel:
    """What ``mk_step`` reads of a model, and the tensors that hold it.

    Matrices that have the wanted dtype already are read where they are; everything else is a
    copy of the parameters as they were. ``nbytes`` is what one token reads.
    """

    def __init__(self, model: MambaLM, weights: Weights | None) -> None:
        library = step_library()
        dtype = storage(model, weights)
        blocks: list[Any] = list(model.backbone.layers)
        mixers = [block.mixer for block in blocks]
        head = model.lm_head.weight.detach()
        matrices = [
            projection.weight.detach()
            for mixer in mixers
            for projection in (mixer.in_proj, mixer.x_proj, mixer.out_proj)
        ]
        self._tensors: dict[int, Tensor] = {}
        packer = _Packer(library, dtype, [*matrices, head])

        layers = (StepLayer * len(blocks))()
        for i, (layer, block, mixer) in enumerate(zip(layers, blocks, mixers, strict=True)):
            in_proj, x_proj, out_proj = matrices[3 * i : 3 * i + 3]
            layer.gain = self._floats(block.norm.weight)
            layer.eps = block.norm.eps
            layer.in_proj = self._matrix(packer.pack(in_proj))
            layer.in_bias = self._floats(mixer.in_proj.bias)
            layer.conv = self._floats(mixer.conv1d.weight.squeeze(1).T)
            layer.conv_bias = self._floats(mixer.conv1d.bias)
            layer.x_proj = self._matrix(packer.pack(x_proj))
            layer.selection_eps = mixer.selection_norm_eps or 0.0
            layer.dt_proj = self._matrix(packer.pack_transposed(mixer.dt_proj.weight.detach()))
            layer.dt_bias = self._floats(mixer.dt_proj.bias)
            layer.A = self._floats(-torch.exp(mixer.A_log.detach()) / math.log(2))
            layer.D = self._floats(mixer.D)
            layer.out_proj = self._matrix(packer.pack(out_proj))
            layer.out_bias = self._floats(mixer.out_proj.bias)

        first, config = mixers[0], model.config
        norm: Any = model.backbone.norm_f
        self.model = StepModel(
            storage=STORAGE_CODES[dtype],
            layers=len(blocks),
            m=config.d_model,
            d=config.d_inner,
            n=first.d_state,
            r=first.dt_rank,
            w=config.d_conv,
            layer=ctypes.cast(layers, ctypes.POINTER(StepLayer)),
            gain=self._floats(norm.weight),
            eps=norm.eps,
            head=self._matrix(packer.pack(head)),
        )
        self._layers = layers
        self.nbytes = sum(tensor.nbytes for tensor in self._tensors.values())

    def _hold(self, tensor: Tensor) -> int:
        address = tensor.data_ptr()
        self._tensors[address] = tensor
        return address

    def _floats(self, tensor: Tensor | None) -> int | None:
        """Keep a float32 copy, which no change of a parameter reaches half-way."""
        if tensor is None:
            return None
        return self._hold(tensor.detach().to(torch.float32, copy=True).contiguous())

    def _matrix(self, matrix: _Matrix) -> StepMatrix:
        scales = None if matrix.scales is None else self._hold(matrix.scales)
        return StepMatrix(self._hold(matrix.weights), scales, *matrix.weights.shape)


def storage(model: MambaLM, weights: Weights | None) -> torch.dtype:
    """Return the dtype of the matrices that a token reads."""
    if weights is None:
        return model.lm_head.weight.dtype
    return {"bf16": torch.bfloat16, "int8": torch.int8}[weights]


def rounded(model: MambaLM, weights: Weights) -> MambaLM:
    """Return a float32 copy whose matrices have the values that the step's weights stand for.

    It is as slow and as large as any model in float32, and there to be examined: its loss is
    the loss that generation with these weights has. The embedding stays as it is, and is no
    longer tied to the output layer.

    Raises:
        RuntimeError: There is no CPU library; the message says why.

    Example:
        >>> from mambakit import MambaConfig
        >>> model = MambaLM(MambaConfig(d_model=16, n_layer=1, vocab_size=32))
        >>> weight = rounded(model, "int8").lm_head.weight
        >>> scale = model.lm_head.weight.abs().amax(dim=1, keepdim=True) / 127
        >>> bool(((weight - model.lm_head.weight).abs() <= 0.51 * scale).all())
        True
    """
    library, dtype = step_library(), storage(model, weights)

    def values(matrix: Any) -> nn.Parameter:
        source = matrix.detach()
        packed = _Packer(library, dtype, [source]).pack(source)
        return nn.Parameter(packed.values(), requires_grad=matrix.requires_grad)

    result = copy.deepcopy(model).float()
    result.config = dataclasses.replace(model.config, tie_embeddings=False)
    result.lm_head.weight = values(model.lm_head.weight)
    for block, source in zip(result.backbone.layers, model.backbone.layers, strict=True):
        for name in ("in_proj", "x_proj", "dt_proj", "out_proj"):
            getattr(block.mixer, name).weight = values(getattr(source.mixer, name).weight)
    return result
