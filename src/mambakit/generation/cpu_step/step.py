"""One token of a language model on a CPU, or a few, in one call of the compiled library."""

import ctypes
import operator
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple, get_args
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from mambakit.models import MambaLM, ModelState
from mambakit.models.backbone import Backbone
from mambakit.modules import Block, Linear, Mamba, MixerState, RMSNorm
from mambakit.modules.mamba import StepProjection
from mambakit.ops import _native

from .library import STORAGE_CODES, StepCall, step_library
from .packing import PackedModel, Weights

# What the step computes in the place of these modules. Anything else has a forward of its own.
_KNOWN = {
    MambaLM, Backbone, Block, Mamba, RMSNorm, Linear, StepProjection,
    nn.Embedding, nn.Conv1d, nn.ModuleList,
}  # fmt: skip

# A thread pays when it has at least this many bytes of a layer to read.
_SHARE = 2**16

_version = operator.attrgetter("_version")

_NO_GRADIENTS = (
    "CPUStep: it passes no gradients on: call it in torch.inference_mode() or torch.no_grad()"
)


# A state, while it lives, and where its layers lie.
_Newest = tuple[Callable[[], ModelState | None], tuple[list[int], list[int]]]


class StepOutput(NamedTuple):
    """What a step returns: the next token's ``logits``, and the ``state``."""

    logits: Float[Tensor, "b v"]
    state: ModelState


def refusal(model: nn.Module) -> str | None:
    """Say in one clause why ``CPUStep`` cannot stand for a model, or return ``None`` if it can.

    Example:
        >>> from mambakit import MambaConfig
        >>> config = MambaConfig(d_model=16, n_layer=1, vocab_size=32)
        >>> refusal(MambaLM(config, device="meta"))
        'the model is on meta, not on a CPU'
    """
    why = _native.unavailable()
    if why is not None:
        return why
    if not isinstance(model, MambaLM):
        return f"the model is a {type(model).__name__}, not a MambaLM"
    for name, module in model.named_modules():
        if type(module) not in _KNOWN:
            return f"{name or 'the model'} is a {type(module).__name__}"
        if _is_changed(module):
            return f"{name or 'the model'} has hooks or a forward of its own"
        if isinstance(module, Mamba) and module.backend not in ("auto", "fused"):
            return f"the model names another backend, {module.backend!r}"
    for name, parameter in model.named_parameters():
        if parameter.device.type != "cpu":
            return f"the model is on {parameter.device.type}, not on a CPU"
        if type(parameter) is not nn.Parameter or parameter.layout != torch.strided:
            return f"{name} is a {type(parameter).__name__} of layout {parameter.layout}"
        if parameter.is_inference():
            return f"{name} was made in inference mode, where changes are not counted"
    dtypes = {model.lm_head.weight.dtype}
    dtypes |= {module.weight.dtype for module in model.modules() if isinstance(module, Linear)}
    if len(dtypes) > 1 or not dtypes <= STORAGE_CODES.keys():
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        return f"the model is in {names}, not in one of float32, bfloat16 and float16"
    return None


def _is_changed(module: nn.Module) -> bool:
    return "forward" in module.__dict__ or any(
        (
            module._forward_pre_hooks, module._forward_hooks,
            module._backward_pre_hooks, module._backward_hooks,
        )
    )  # fmt: skip


class CPUStep:
    """Compute one token for each of a few sequences, reading each weight once.

        logits, state = step(tokens, state)     is     model(tokens[:, None], state)

    On a CPU a token takes as long as memory takes to give the weights. The step is one call
    that streams them through all cores; ``weights`` makes them fewer bytes.

    Args:
        model: The language model, on the CPU, in float32, bfloat16 or float16.
        weights: ``None`` reads the matrices as the model has them, where it has them.
            ``"bf16"`` rounds them to bfloat16, half of float32's bytes; ``"int8"`` to whole
            numbers from -127 to 127 times one scale for each row of a matrix, a quarter.
            The embedding is not rounded, though the output layer is that is tied to it.

    All arithmetic is in float32, whatever the weights are: the results are those of a model in
    float32 that has the same weights (see ``rounded``). The state has float32 tensors, and
    goes back and forth between the step and the model at any token. A sequence's result
    depends neither on the other sequences nor on the number of threads.

    Each call looks whether the parameters are still those that were packed, and packs them
    again if an optimiser, ``load_state_dict`` or an assignment has changed them. A change
    through ``parameter.data[...] = ...``, which PyTorch does not count, is not seen by a step
    that is there already, but by a new one. What is rounded is kept as long as the model lives,
    for all of its steps.

    Raises:
        ValueError: There are no such ``weights``.
        RuntimeError: The step cannot stand for this model; ``refusal`` says why.

    Example:
        >>> from mambakit import MambaConfig
        >>> model = MambaLM(MambaConfig(d_model=16, n_layer=2, vocab_size=32))
        >>> tokens = torch.randint(32, (3, 10))
        >>> with torch.inference_mode():
        ...     state = model(tokens[:, :9]).state
        ...     logits, state = CPUStep(model)(tokens[:, 9], state)
        ...     torch.testing.assert_close(logits, model(tokens).logits[:, 9])
    """

    def __init__(self, model: MambaLM, weights: Weights | None = None) -> None:
        if weights is not None and weights not in get_args(Weights):
            raise ValueError(
                f"CPUStep: weights must be None or one of {', '.join(get_args(Weights))}, "
                f"got {weights!r}"
            )
        self._model, self._weights = model, weights
        self._newest: _Newest = (lambda: None, ([], []))
        self._pack()

    def _pack(self) -> None:
        why = refusal(self._model)
        if why is not None:
            raise RuntimeError(f"CPUStep: it cannot stand for this model: {why}")
        self._library = step_library()
        if self._weights is None:
            self._seen, self._packed = _Seen(self._model), PackedModel(self._model, None)
        else:
            self._seen, self._packed = _rounded_copy(self._model, self._weights)

    @property
    def nbytes(self) -> int:
        """Bytes of weights that one token reads."""
        return self._packed.nbytes

    def __call__(
        self, tokens: Int[Tensor, " b"], state: ModelState | None = None
    ) -> StepOutput:
        """Return the logits after one more token of each sequence, and the state after it.

        Args:
            tokens: Token ids, int64 or int32, each in ``[0, vocab_size)``.
            state: What an earlier call or the model's forward returned; ``None`` begins.

        Returns:
            ``logits`` in float32 over the padded vocabulary, and the ``state``. Neither
            carries gradients.

        Raises:
            ValueError: ``tokens`` are not whole numbers of shape ``(b,)`` in the vocabulary,
                or ``state`` is of a model of other sizes or of another number of sequences.
            RuntimeError: Gradients are asked for, or the model has become one that the step
                cannot stand for.
        """
        self._check_tokens(tokens, "(b,)")
        return self._compute(tokens[:, None], state)

    def read(self, tokens: Int[Tensor, "b l"], state: ModelState | None = None) -> StepOutput:
        """Return the logits after each of a few tokens, and the states after each of them.

            logits, states = step.read(tokens, state)

        is a call of the step for each column of ``tokens``, bit for bit, but reads each weight
        once. Meant for few tokens: all their states are kept.

        Args:
            tokens: Token ids, int64 or int32, each in ``[0, vocab_size)``, and l at least 1.
            state: As in a call.

        Returns:
            ``logits`` (b, l, v), and states of b l sequences: that after token ``t`` of
            sequence ``i`` is number ``i l + t``.

        Raises:
            ValueError: As in a call.
            RuntimeError: As in a call.

        Example:
            >>> from mambakit import MambaConfig
            >>> model = MambaLM(MambaConfig(d_model=16, n_layer=2, vocab_size=32))
            >>> tokens = torch.randint(32, (1, 6))
            >>> with torch.inference_mode():
            ...     logits, states = CPUStep(model).read(tokens)
            ...     again = model(tokens[:, 4:], states[3]).logits
            ...     torch.testing.assert_close(logits[:, 4:], again)
        """
        self._check_tokens(tokens, "(b, l)")
        logits, states = self._compute(tokens, state)
        return StepOutput(logits.unflatten(0, tokens.shape), states)

    def _compute(self, tokens: Tensor, state: ModelState | None) -> StepOutput:
        """Return the logits (b l, v) and the states after the tokens (b, l)."""
        if self._seen.has_changed():
            self._pack()
        if torch.is_grad_enabled() and self._seen.requires_grad():
            raise RuntimeError(_NO_GRADIENTS)
        model, config = self._packed.model, self._model.config
        n_layer, d, past = config.n_layer, config.d_inner, config.d_conv - 1
        before: tuple[Any, Any] = (None, None)
        if state is not None:
            b = len(tokens)
            newest, places_of_newest = self._newest
            if state is newest() and len(state) == b:
                conv_before, ssm_before = places_of_newest
            else:
                _check_state(state, n_layer, (b, d, past), (b, d, config.d_state))
                dense = _dense(state)
                conv_before, ssm_before = ([t.data_ptr() for t in part] for part in dense)
            places = ctypes.c_void_p * n_layer
            before = places(*conv_before), places(*ssm_before)

        l = tokens.shape[1]
        tokens = tokens.flatten()
        b = len(tokens)
        x = F.embedding(tokens, self._model.backbone.embedding.weight.detach()).float()
        conv = torch.empty(n_layer, b, past, d)
        ssm = torch.empty(n_layer, b, d, config.d_state)
        logits = torch.empty(b, config.padded_vocab_size)
        if b > 0:
            threads = max(1, min(torch.get_num_threads(), self.nbytes // n_layer // _SHARE))
            scratch = torch.empty(self._library.scratch(model, b, threads))
            self._library.step(
                model,
                StepCall(
                    b,
                    threads,
                    x.data_ptr(),
                    *before,
                    conv.data_ptr(),
                    ssm.data_ptr(),
                    logits.data_ptr(),
                    scratch.data_ptr(),
                    l,
                ),
            )
        layers = map(MixerState, conv.transpose(2, 3).unbind(), ssm.unbind())
        state = ModelState(tuple(layers))
        # The next call most often goes on from here, and need not look through the layers.
        self._newest = weakref.ref(state), (_layers_of(conv), _layers_of(ssm))
        return StepOutput(logits, state)

    def _check_tokens(self, tokens: Tensor, shape: str) -> None:
        if not isinstance(tokens, Tensor):
            raise ValueError(f"CPUStep: tokens must be a tensor, got {type(tokens).__name__}")
        if tokens.ndim != len(shape.split()) or tokens.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                f"CPUStep: tokens must be int64 or int32 of shape {shape}, "
                f"got {str(tokens.dtype).removeprefix('torch.')} of shape {tuple(tokens.shape)}"
            )
        if not tokens.is_cpu:
            raise ValueError(f"CPUStep: tokens must be on the CPU, got {tokens.device}")
        vocab_size = self._model.config.vocab_size
        for token in tokens.flatten().tolist():
            if not 0 <= token < vocab_size:
                raise ValueError(f"CPUStep: tokens must be in [0, {vocab_size}), got {token}")


class _Seen:
    """What a model consisted of when it was looked at, to tell whether that has changed.

    It looks before each token, so its loops are those of ``map``.
    """

    def __init__(self, model: MambaLM) -> None:
        places = [
            (members, name)
            for module in model.modules()
            for members in (module._modules, module._parameters)
            for name in members
        ]
        self._members, self._names = zip(*places, strict=True)
        self._values = self._look()
        self._parameters = list(model.parameters())
        self._versions, self._addresses = self._look_inside()

    def _look(self) -> list[Any]:
        return list(map(dict.get, self._members, self._names))

    def _look_inside(self) -> tuple[list[int], list[int]]:
        parameters = self._parameters
        return list(map(_version, parameters)), list(map(Tensor.data_ptr, parameters))

    def has_changed(self) -> bool:
        """Say whether a module or parameter was exchanged, or a parameter written to."""
        same = all(map(operator.is_, self._look(), self._values))
        return not same or self._look_inside() != (self._versions, self._addresses)

    def requires_grad(self) -> bool:
        """Say whether any parameter does."""
        return any(parameter.requires_grad for parameter in self._parameters)


class _Copy(NamedTuple):
    """A rounded copy, and what it was made from. It does not hold on to the model itself."""

    seen: _Seen
    sums: list[int]
    packed: PackedModel


_copies: WeakKeyDictionary[MambaLM, dict[Weights, _Copy]] = WeakKeyDictionary()


def _rounded_copy(model: MambaLM, weights: Weights) -> tuple[_Seen, PackedModel]:
    """Return the copy that the model has, or make it, which takes as long as tens of tokens."""
    sums = [_sum_of_bits(parameter) for parameter in model.parameters()]
    kept = _copies.setdefault(model, {})
    copy = kept.get(weights)
    if copy is None or copy.seen.has_changed() or copy.sums != sums:
        kept[weights] = copy = _Copy(_Seen(model), sums, PackedModel(model, weights))
    return copy.seen, copy.packed


def _sum_of_bits(tensor: Tensor) -> int:
    """Return a number that changes with any one change of a tensor, at the speed of memory."""
    flat = tensor.detach().flatten()
    if flat.storage_offset() * flat.itemsize % 8:
        flat = flat.clone()
    flat = flat.view(torch.uint8)
    whole = len(flat) // 8 * 8
    return int(flat[:whole].view(torch.int64).sum()) + int(flat[whole:].sum())


def _check_state(
    state: ModelState, n_layer: int, conv: tuple[int, ...], ssm: tuple[int, ...]
) -> None:
    if not isinstance(state, ModelState):
        raise ValueError(
            f"CPUStep: state must be a ModelState or None, got {type(state).__name__}"
        )
    if len(state.layers) != n_layer:
        raise ValueError(
            f"CPUStep: state must have {n_layer} layers, got {len(state.layers)}: it is "
            "another model's"
        )
    for i, layer in enumerate(state.layers):
        for name, tensor, shape in (("conv", layer.conv, conv), ("ssm", layer.ssm, ssm)):
            if tensor.shape != shape:
                raise ValueError(
                    f"CPUStep: state must have {name} of {shape} in layer {i}, "
                    f"got {tuple(tensor.shape)}"
                )
            if not tensor.is_cpu:
                raise ValueError(f"CPUStep: state must be on the CPU, got {tensor.device}")
            if tensor.requires_grad and torch.is_grad_enabled():
                raise RuntimeError(_NO_GRADIENTS)


def _dense(state: ModelState) -> tuple[list[Tensor], list[Tensor]]:
    """Return each layer's (b, w - 1, d) and (b, d, n) as dense float32."""
    conv = [layer.conv.transpose(1, 2).float().contiguous() for layer in state.layers]
    return conv, [layer.ssm.float().contiguous() for layer in state.layers]


def _layers_of(tensor: Tensor) -> list[int]:
    """Return where each layer of a dense tensor lies, whose first axis counts layers."""
    first, size = tensor.data_ptr(), tensor.stride(0) * tensor.itemsize
    return [first + i * size for i in range(len(tensor))]
