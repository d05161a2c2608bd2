"""One token of a language model on a CPU, or a few, in one call of the compiled library."""

import ctypes
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple, get_args
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from mambakit.models import MambaLM, ModelState
from mambakit.modules import MixerState
from mambakit.ops import _native

from ..stand_in import Seen, check_state, check_tokens, no_gradients, refusal_of, sum_of_bits
from .library import StepCall, step_library
from .packing import PackedModel, Weights

_CPU = torch.device("cpu")

# A thread pays when it has at least this many bytes of a layer to read.
_SHARE = 2**16

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
    return refusal_of(model, "cpu", "a CPU")


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
            self._seen, self._packed = Seen(self._model), PackedModel(self._model, None)
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
            tokens: Token ids, int64 or int32, each in ``[0, vocab_size)``.
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
            raise RuntimeError(no_gradients("CPUStep"))
        model, config = self._packed.model, self._model.config
        n_layer, d, past = config.n_layer, config.d_inner, config.d_conv - 1
        before: tuple[Any, Any] = (None, None)
        if state is not None:
            b = len(tokens)
            newest, places_of_newest = self._newest
            if state is newest() and len(state) == b:
                conv_before, ssm_before = places_of_newest
            else:
                check_state(
                    "CPUStep", state, n_layer, (b, d, past), (b, d, config.d_state), _CPU
                )
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
        check_tokens("CPUStep", tokens, _CPU, shape)
        vocab_size = self._model.config.vocab_size
        for token in tokens.flatten().tolist():
            if not 0 <= token < vocab_size:
                raise ValueError(f"CPUStep: tokens must be in [0, {vocab_size}), got {token}")


class _Copy(NamedTuple):
    """A rounded copy, and what it was made from. It does not hold on to the model itself."""

    seen: Seen
    sums: list[int]
    packed: PackedModel


_copies: WeakKeyDictionary[MambaLM, dict[Weights, _Copy]] = WeakKeyDictionary()


def _rounded_copy(model: MambaLM, weights: Weights) -> tuple[Seen, PackedModel]:
    """Return the copy that the model has, or make it, which takes as long as tens of tokens."""
    sums = [int(sum_of_bits(parameter)) for parameter in model.parameters()]
    kept = _copies.setdefault(model, {})
    copy = kept.get(weights)
    if copy is None or copy.seen.has_changed() or copy.sums != sums:
        kept[weights] = copy = _Copy(Seen(model), sums, PackedModel(model, weights))
    return copy.seen, copy.packed


def _dense(state: ModelState) -> tuple[list[Tensor], list[Tensor]]:
    """Return each layer's (b, w - 1, d) and (b, d, n) as dense float32."""
    conv = [layer.conv.transpose(1, 2).float().contiguous() for layer in state.layers]
    return conv, [layer.ssm.float().contiguous() for layer in state.layers]


def _layers_of(tensor: Tensor) -> list[int]:
    """Return where each layer of a dense tensor lies, whose first axis counts layers."""
    first, size = tensor.data_ptr(), tensor.stride(0) * tensor.itemsize
    return [first + i * size for i in range(len(tensor))]
