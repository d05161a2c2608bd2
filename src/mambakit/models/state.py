"""What a model remembers between two calls, as a value."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, Any, TypeGuard, cast

import torch
from jaxtyping import Float
from torch import Tensor

from mambakit.modules import MixerState

from .config import MambaConfig
from .state_file import read_layers, write_layers


@dataclass(frozen=True, eq=False)
class ModelState:
    """Hold the state of every layer for a batch of sequences.

    A state never changes: each call of a model returns a new one, and the old one may be used
    again, to try another continuation from the same place. Its size does not grow with the
    sequences, which makes it a prefix cache of a few megabytes: read a long text once, keep or
    save its state, and fork it into as many continuations as are wanted. It is a pytree, so
    ``torch.compile`` and ``torch.export`` take it.

    Attributes:
        layers: One state for each layer, in order; sequences lie along the first axis of each
            of its tensors.

    Example:
        >>> from mambakit import MambaConfig, MambaLM
        >>> model = MambaLM(MambaConfig(d_model=16, n_layer=2, vocab_size=32))
        >>> tokens = torch.randint(32, (3, 10))
        >>> whole = model(tokens)
        >>> state = model(tokens[:, :4]).state
        >>> second = model(tokens[1:2, 4:], state[1])
        >>> torch.testing.assert_close(second.logits, whole.logits[1:2, 4:])
    """

    layers: tuple[MixerState, ...]

    @classmethod
    def stacked(
        cls, conv: Float[Tensor, "k b d p"], ssm: Float[Tensor, "k b d n"]
    ) -> "ModelState":
        """Return the state of ``k`` layers that are the slices of two tensors.

        A step that goes on from it finds the tensors as ``stacks``, whole; the layers, which
        are views of them, are made when somebody looks.

        Raises:
            ValueError: The two are not of as many layers, sequences and channels.

        Example:
            >>> state = ModelState.stacked(torch.zeros(2, 3, 32, 3), torch.zeros(2, 3, 32, 16))
            >>> len(state), state.layers[1].ssm.shape
            (3, torch.Size([3, 32, 16]))
        """
        if conv.ndim != 4 or ssm.ndim != 4 or conv.shape[:3] != ssm.shape[:3]:
            raise ValueError(
                "ModelState: stacks must be (k, b, d, p) and (k, b, d, n), got "
                f"{tuple(conv.shape)} and {tuple(ssm.shape)}"
            )
        state = cls.__new__(cls)
        object.__setattr__(state, "_stacks", MixerState(conv, ssm))
        return state

    @property
    def stacks(self) -> MixerState | None:
        """All layers' states along a first axis more, where they are held so; or ``None``."""
        return self.__dict__.get("_stacks")

    if not TYPE_CHECKING:  # to a checker this would be a promise of every attribute

        def __getattr__(self, name: str) -> Any:
            # asked only for what is not there, as the layers of stacks are not at first
            if name != "layers" or self.stacks is None:
                raise AttributeError(f"a {type(self).__name__} has no attribute {name!r}")
            layers = tuple(map(MixerState, *(part.unbind() for part in self.stacks)))
            # views made without gradients would never have them
            if not any(part.requires_grad for part in self.stacks):
                object.__setattr__(self, name, layers)
            return layers

    def __len__(self) -> int:
        """Return the number of sequences."""
        if self.stacks is not None:
            return self.stacks.ssm.shape[1]
        return self.layers[0].ssm.shape[0]

    def __getitem__(self, index: int | slice | Sequence[int] | Tensor) -> "ModelState":
        """Return the state of some sequences: one, a slice, or what a list or tensor names.

        The batch axis stays, also for one sequence. A list or a tensor gathers: a sequence may
        be named several times, and the result owns its memory. One number, be it in a tensor
        without axes, and a slice give a view, which keeps the memory of all sequences.

        Raises:
            IndexError: There is no such sequence, or a tensor is neither of whole numbers nor
                a mask of the sequences.
        """
        index = self._rows(index)
        if self.stacks is not None:
            return type(self).stacked(*(part[:, index] for part in self.stacks))
        return type(self)(tuple(layer.rows(index) for layer in self.layers))

    def with_rows(
        self, index: int | slice | Sequence[int] | Tensor, other: "ModelState"
    ) -> "ModelState":
        """Return this state with ``other``'s sequences in the places that ``index`` names.

        Raises:
            IndexError: There is no such sequence.
            ValueError: ``other`` is no state, is of a model of other sizes, or has more or
                fewer sequences than there are places.

        Example:
            >>> from mambakit import MambaConfig, MambaLM
            >>> model = MambaLM(MambaConfig(d_model=16, n_layer=1, vocab_size=32))
            >>> state = model(torch.randint(32, (3, 10))).state
            >>> swapped = state.with_rows([0, 2], state[[2, 0]])
            >>> torch.equal(swapped.layers[0].ssm, state[[2, 1, 0]].layers[0].ssm)
            True
        """
        _require_alike("with_rows", [self, other])
        index = self._rows(index)
        places = len(torch.empty(len(self), device=self._device)[index])
        if len(other) != places:
            raise ValueError(
                f"with_rows: other must hold one sequence for each place, {places}, "
                f"got {len(other)}"
            )

        def put(old: Tensor, new: Tensor) -> Tensor:
            whole = old.clone(memory_format=torch.contiguous_format)
            whole[index] = new
            return whole

        return type(self)(
            tuple(
                MixerState(*map(put, old, new))
                for old, new in zip(self.layers, other.layers, strict=True)
            )
        )

    @classmethod
    def cat(cls, states: Sequence["ModelState"]) -> "ModelState":
        """Lay states of one model side by side, as one batch of all their sequences.

        Raises:
            ValueError: There are none, they are no states, or of models of different sizes.

        Example:
            >>> from mambakit import MambaConfig, MambaLM
            >>> model = MambaLM(MambaConfig(d_model=16, n_layer=1, vocab_size=32))
            >>> short = model(torch.tensor([[1, 2]])).state
            >>> long = model(torch.tensor([[3, 4, 5, 6]])).state
            >>> model(torch.tensor([[7], [8]]), ModelState.cat([short, long])).logits.shape
            torch.Size([2, 1, 32])
        """
        _require_alike("cat", states)
        return cls(
            tuple(
                MixerState(*map(torch.cat, zip(*layers, strict=True)))
                for layers in zip(*(state.layers for state in states), strict=True)
            )
        )

    def fork(self, k: int) -> "ModelState":
        """Return ``k`` sequences that all go on from this one.

        They share this state's memory: a thousand forks take no more than one. The model's next
        call gives each its own state, as always.

        Raises:
            ValueError: The state is not of one sequence, or ``k`` is less than 1.

        Example:
            >>> from mambakit import MambaConfig, MambaLM
            >>> model = MambaLM(MambaConfig(d_model=16, n_layer=1, vocab_size=32))
            >>> prefix = model(torch.tensor([[1, 2, 3]])).state
            >>> forks = prefix.fork(1000)
            >>> len(forks), forks.nbytes == prefix.nbytes
            (1000, True)
        """
        if not _is_whole(k) or k < 1:
            raise ValueError(f"fork: k must be a whole number of at least 1, got {k!r}")
        if len(self) != 1:
            raise ValueError(
                f"fork: the state must be of one sequence, got {len(self)}: "
                "choose one with state[i]"
            )
        return type(self)(
            tuple(
                MixerState(*(part.expand(k, -1, -1) for part in layer)) for layer in self.layers
            )
        )

    def detach(self) -> "ModelState":
        """Return the same numbers, cut off from the graph: truncated backpropagation's cut."""
        if self.stacks is not None:
            return type(self).stacked(*self.stacks.detach())
        return type(self)(tuple(layer.detach() for layer in self.layers))

    def to(
        self,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> "ModelState":
        """Move to ``device``; convert the inputs kept by the convolutions to ``dtype``.

        The scans' own states keep at least float32, and forks go on sharing their memory.
        """
        if self.stacks is not None:
            return type(self).stacked(*self.stacks.to(device=device, dtype=dtype))
        return type(self)(tuple(layer.to(device=device, dtype=dtype) for layer in self.layers))

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the state holds.

        What is shared counts once, and what is a view of larger memory keeps all of that.
        """
        memory = [part.untyped_storage() for layer in self.layers for part in layer]
        return sum({one._cdata: one.nbytes() for one in memory}.values())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state to a safetensors file, whole or not at all.

        Forks are written one by one: of a forked state, save the one it came from.

        Raises:
            RuntimeError: The file cannot be written; the message says why.

        Example:
            >>> import tempfile
            >>> from mambakit import MambaConfig, MambaLM
            >>> model = MambaLM(MambaConfig(d_model=16, n_layer=1, vocab_size=32))
            >>> state = model(torch.tensor([[1, 2, 3]])).state
            >>> path = tempfile.mkdtemp() + "/prefix.safetensors"
            >>> state.save(path)
            >>> again = ModelState.load(path, config=model.config)
            >>> torch.equal(again.layers[0].ssm, state.layers[0].ssm)
            True
        """
        write_layers(path, self.layers)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        device: torch.device | str | None = "cpu",
        config: MambaConfig | None = None,
    ) -> "ModelState":
        """Read a state that ``save`` wrote.

        Args:
            path: The file.
            device: Where the state goes; ``None`` means torch's default.
            config: That of the model that is to go on from it. The sizes must be equal; whether
                the weights are those that made the state, no file can tell.

        Raises:
            ValueError: The file is missing, damaged or holds something else, or its state is of
                a model of other sizes than ``config``.
        """
        layers, extra = read_layers(path, device, config)
        if extra:
            raise ValueError(
                f"load: {path} must hold a state alone, got {', '.join(sorted(extra))} too: "
                "it is a bookmark of mambakit.generation"
            )
        return cls(layers)

    @property
    def _device(self) -> torch.device:
        return (self.stacks or self.layers[0]).ssm.device

    def _rows(self, index: int | slice | Sequence[int] | Tensor) -> slice | Tensor:
        count = len(self)
        if isinstance(index, Tensor):
            if index.ndim == 1 and _names_rows(index, count):
                return index
            if index.ndim != 0:
                raise IndexError(
                    "ModelState: a tensor must hold the numbers of sequences, or True or False "
                    f"for each of {count}, got {str(index.dtype).removeprefix('torch.')} "
                    f"of shape {tuple(index.shape)}"
                )
            index = cast(int, index.item())  # or what is refused below
        if isinstance(index, slice):
            return index
        rows = list(index) if isinstance(index, Iterable) else [index]
        for row in rows:
            if not _is_whole(row) or not -count <= row < count:
                raise IndexError(f"ModelState: sequence {row!r} of {count} does not exist")
        if isinstance(index, Iterable):
            return torch.tensor(rows, dtype=torch.int64, device=self._device)
        return slice(index % count, index % count + 1)


def _names_rows(index: Tensor, count: int) -> bool:
    """Say whether a tensor of one axis can choose among ``count`` rows."""
    if index.dtype == torch.bool:
        return index.shape[0] == count
    return index.dtype in (torch.int64, torch.int32)


def _is_whole(value: object) -> TypeGuard[int]:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _require_alike(operation: str, states: Sequence[ModelState]) -> None:
    if not isinstance(states, Sequence):
        raise ValueError(
            f"{operation}: states must be a list of ModelStates, got {type(states).__name__}"
        )
    if not states:
        raise ValueError(f"{operation}: states must be at least one, got none")
    for state in states:
        if not isinstance(state, ModelState):
            raise ValueError(
                f"{operation}: each state must be a ModelState, got {type(state).__name__}"
            )
    kinds = [
        [(part.shape[1:], part.dtype, part.device) for layer in state.layers for part in layer]
        for state in states
    ]
    for kind in kinds[1:]:
        if kind != kinds[0]:
            raise ValueError(
                f"{operation}: states must be of one model, dtype and device, "
                f"got {_kind(kinds[0])} and {_kind(kind)}"
            )


def _kind(kind: list[tuple[torch.Size, torch.dtype, torch.device]]) -> str:
    shapes = ", ".join(
        f"{tuple(shape)} {str(dtype).removeprefix('torch.')}" for shape, dtype, _ in kind[:2]
    )
    return f"{len(kind) // 2} layers of {shapes} on {kind[0][2]}"


torch.export.register_dataclass(ModelState, serialized_type_name="mambakit.ModelState")
