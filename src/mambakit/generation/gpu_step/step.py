"""One token of a language model on a GPU, as one CUDA graph."""

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple, get_args
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Int
from torch import Tensor, nn

from mambakit.models import MambaLM, ModelState
from mambakit.ops import _cuda

from ..cpu_step import StepOutput, Weights
from ..stand_in import Seen, check_state, check_tokens, no_gradients, refusal_of
from .arguments import Call
from .graph import Graph
from .launches import Launches
from .multiplication import Multiplication
from .packing import PackedModel
from .sums import sums_of_bits
from .tiling import room

# Graphs of so many different numbers of sequences are kept for a model.
_MOST_GRAPHS = 12
# The kernels are compiled for a model's sizes, and keep what is this long in registers.
_LARGEST = {"dt_rank": 1024, "d_model": 2**15, "d_conv": 64}


def refusal(model: nn.Module) -> str | None:
    """Say in one clause why ``GPUStep`` cannot stand for a model, or return ``None`` if it can.

    Example:
        >>> from mambakit import MambaConfig
        >>> config = MambaConfig(d_model=16, n_layer=1, vocab_size=32)
        >>> refusal(MambaLM(config, device="meta"))
        'the model is on meta, not on a GPU of CUDA'
    """
    why = refusal_of(model, _DEVICE, "a GPU of CUDA")
    if why is not None or not isinstance(model, MambaLM):
        return why
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) > 1:
        return f"the model is on {len(devices)} devices"
    sizes = {"dt_rank": model.config.rank, "d_model": model.config.d_model}
    sizes["d_conv"] = model.config.d_conv
    for name, size in sizes.items():
        if size > _LARGEST[name]:
            return f"{name} is {size}, more than {_LARGEST[name]}"
    return _why_no_kernels(devices.pop())


# What the emulator of the tests replaces: kernels run on its tensors, and need no graph.
_DEVICE = "cuda"


def _why_no_kernels(device: torch.device) -> str | None:
    return _cuda.unavailable(device.index)


class GPUStep:
    """Compute one token for each of a number of sequences, by one CUDA graph.

        logits, state = step(tokens, state)     is     model(tokens[:, None], state)

    A token takes about as long as the GPU's memory takes to give the weights and the state;
    ``weights`` makes the former fewer bytes. The kernels are compiled when a model of new sizes
    is first stepped, and a graph is made for each of a few numbers of sequences, when it is
    first needed: 1, 2, 4, 8, 16 and so on have room for those between.

    Args:
        model: The language model, on a GPU of compute capability 8.0 or newer, in float32,
            bfloat16 or float16.
        weights: ``None`` reads the matrices as the model has them, where it has them.
            ``"bf16"`` rounds them to bfloat16; ``"int8"`` to whole numbers from -127 to 127
            times one scale for each row of a matrix. The embedding is not rounded, though the
            output layer is that is tied to it.

    All sums are in float32, and so are the stream between the layers and the scan's arithmetic.
    Vectors that tensor cores multiply are rounded as the model's forward rounds them in its own
    dtype, a float32 model's to bfloat16 where its weights are. A float32 model with its own
    weights is computed in float32 throughout. The state goes back and forth between the step
    and the model at any token, and no call changes a state that it was given.

    From 17 sequences on cuBLAS multiplies the large matrices, if they are of 16-bit numbers and
    the model's other sizes allow it. What in_proj gives is then rounded to the vectors' dtype
    before its bias, its gate and the convolution's window, also in a float32 model with weights
    of ``"bf16"``. Whether its sums may be in fewer digits than float32 is what
    ``torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction`` and its like for
    float16 said when the graph was made; for the output layer, what they say at the call.

    A token outside the vocabulary makes its own row's logits and state NaN: to refuse it would
    take as long as the step, for the host would have to wait.

    Each call looks whether the parameters are still those that were packed, and packs them
    again if they have changed. A change through ``parameter.data[...] = ...``, which PyTorch
    does not count, is not seen by a step that is there already, but by a new one. What is
    packed and the graphs are kept as long as the model lives, for all of its steps.

    Raises:
        ValueError: There are no such ``weights``.
        RuntimeError: The step cannot stand for this model, or a kernel cannot be compiled; the
            message says why.
    """

    def __init__(self, model: MambaLM, weights: Weights | None = None) -> None:
        if weights is not None and weights not in get_args(Weights):
            raise ValueError(
                f"GPUStep: weights must be None or one of {', '.join(get_args(Weights))}, "
                f"got {weights!r}"
            )
        self._model, self._weights = model, weights
        self._pack()

    def _pack(self) -> None:
        why = refusal(self._model)
        if why is not None:
            raise RuntimeError(f"GPUStep: it cannot stand for this model: {why}")
        self._seen, self._packed, self._graphs = _prepared(self._model, self._weights)

    @property
    def nbytes(self) -> int:
        """Bytes of parameters that one token reads."""
        return self._packed.nbytes

    def __call__(
        self, tokens: Int[Tensor, " b"], state: ModelState | None = None
    ) -> StepOutput:
        """Return the logits after one more token of each sequence, and the state after it.

        Args:
            tokens: Token ids, int64 or int32, on the model's device.
            state: What an earlier call or the model's forward returned; ``None`` begins.

        Returns:
            ``logits`` in float32 over the padded vocabulary, and the ``state``, with ``conv``
            in the model's dtype and ``ssm`` in float32. Neither carries gradients.

        Raises:
            ValueError: ``tokens`` are not whole numbers of shape ``(b,)`` on the model's
                device, or ``state`` is of a model of other sizes or of another number of
                sequences.
            RuntimeError: Gradients are asked for, or the model has become one that the step
                cannot stand for.
        """
        if self._seen.has_changed():
            self._pack()
        packed = self._packed
        device = packed.embedding.device
        check_tokens("GPUStep", tokens, device)
        if torch.is_grad_enabled() and self._seen.requires_grad():
            raise RuntimeError(no_gradients("GPUStep"))
        b, past, layers = len(tokens), packed.w - 1, packed.n_layer
        before: tuple[Tensor, ...] = ()
        if state is not None:
            sizes = (b, packed.d, past), (b, packed.d, packed.n)
            check_state("GPUStep", state, layers, *sizes, device)
            before = _in_one_piece(state, packed.dtype)

        wide = torch.float32
        conv = torch.empty(layers, b, past, packed.d, device=device, dtype=packed.dtype)
        ssm = torch.empty(layers, b, packed.d, packed.n, device=device, dtype=wide)
        logits = torch.empty(b, packed.head.rows, device=device, dtype=wide)
        if b > 0:
            old = [tensor.data_ptr() or None for tensor in before] or [None, None]
            new = conv.data_ptr(), ssm.data_ptr(), logits.data_ptr()
            self._graphs.run(Call(b, *old, *new), tokens.contiguous(), logits)
        return StepOutput(logits, ModelState.stacked(conv.transpose(2, 3), ssm))


class _Graphs:
    """The graphs of a packed model, one for each size of batch; the least used ones go."""

    def __init__(self, packed: PackedModel) -> None:
        self._packed = packed
        self._kept: OrderedDict[int, tuple[Launches, Callable[[], None]]] = OrderedDict()
        self._lock = threading.Lock()
        self._stream: tuple[int, torch.cuda.Stream] | None = None

    def run(self, call: Call, tokens: Tensor, logits: Tensor) -> None:
        """Queue one token."""
        # two threads that took turns between the launches would mix their tokens
        with self._lock:
            if tokens.is_cuda:
                self._follow(tokens.device.index)
            launches, rest = self._for(room(len(tokens)))
            launches.begin(call, tokens)
            rest()
            launches.end(logits)

    def _for(self, size: int) -> tuple[Launches, Callable[[], None]]:
        if size in self._kept:
            self._kept.move_to_end(size)
            return self._kept[size]
        launches = Launches(self._packed, size)

        def queue() -> None:
            for launch in launches.rest:
                launch.run()

        device = self._packed.embedding.device
        rest: Callable[[], None] = queue
        if device.type == "cuda":
            multiplies = any(isinstance(launch, Multiplication) for launch in launches.rest)
            rest = Graph(device, queue, multiplies=multiplies).launch
        self._kept[size] = launches, rest
        if len(self._kept) > _MOST_GRAPHS:
            self._kept.popitem(last=False)
        return self._kept[size]

    def _follow(self, device_index: int) -> None:
        """Wait on the GPU for a call on another stream: they share the memory in between."""
        handle = torch._C._cuda_getCurrentRawStream(device_index)
        if self._stream is not None and self._stream[0] == handle:
            return
        stream = torch.cuda.current_stream(device_index)
        if self._stream is not None:
            stream.wait_stream(self._stream[1])
        self._stream = handle, stream


class _Prepared(NamedTuple):
    """A packed model, and what it was made from. It does not hold on to the model itself."""

    seen: Seen
    sums: list[int]
    packed: PackedModel
    graphs: _Graphs


_prepared_models: WeakKeyDictionary[MambaLM, dict[Weights | None, _Prepared]] = (
    WeakKeyDictionary()
)


def _prepared(model: MambaLM, weights: Weights | None) -> tuple[Seen, PackedModel, _Graphs]:
    """Return what the model has, or make it, which takes as long as a hundred tokens."""
    sums = sums_of_bits(list(model.parameters()))
    kept = _prepared_models.setdefault(model, {})
    found = kept.get(weights)
    if found is None or found.seen.has_changed() or found.sums != sums:
        packed = PackedModel(model, weights)
        found = kept[weights] = _Prepared(Seen(model), sums, packed, _Graphs(packed))
    return found.seen, found.packed, found.graphs


def _in_one_piece(state: ModelState, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the state's (layers, b, w - 1, d) and (layers, b, d, n), copies if need be."""
    if state.stacks is not None:
        conv, ssm = state.stacks.conv.transpose(2, 3), state.stacks.ssm
    else:
        conv = torch.stack([layer.conv.transpose(1, 2) for layer in state.layers])
        ssm = torch.stack([layer.ssm for layer in state.layers])
    return _dense(conv, dtype), _dense(ssm, torch.float32)


def _dense(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor as kernels read it: contiguous, on a border of 16 bytes."""
    dense = tensor.to(dtype).contiguous()
    return dense.clone() if dense.data_ptr() % 16 else dense
