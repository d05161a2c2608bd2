"""What a model remembers between two calls, as a value."""

from dataclasses import dataclass

import torch
from torch import Tensor

from mambakit.modules import MixerState


@dataclass(frozen=True, eq=False)
class ModelState:
    """Hold the state of every layer for a batch of sequences.

    A state never changes: each call of a model returns a new one, and the old one may be used
    again, to try another continuation from the same place. Its size does not grow with the
    sequences. It is a pytree, so ``torch.compile`` and ``torch.export`` take it.

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

    def __len__(self) -> int:
        """Return the number of sequences."""
        return self.layers[0].ssm.shape[0]

    def __getitem__(self, index: int | slice | Tensor) -> "ModelState":
        """Return the state of some sequences: one, a slice, or those a tensor of indices names.

        The batch axis stays, also for one sequence.

        Raises:
            IndexError: There is no such sequence.
        """
        if isinstance(index, int):
            count = len(self)
            if not -count <= index < count:
                raise IndexError(f"ModelState: sequence {index} of {count} does not exist")
            index = slice(index % count, index % count + 1)
        return type(self)(tuple(layer.rows(index) for layer in self.layers))

    def detach(self) -> "ModelState":
        """Return the same numbers, cut off from the graph: truncated backpropagation's cut."""
        return type(self)(tuple(layer.detach() for layer in self.layers))

    def to(
        self,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> "ModelState":
        """Move to ``device``; convert the inputs kept by the convolutions to ``dtype``.

        The scans' own states keep at least float32.
        """
        return type(self)(tuple(layer.to(device=device, dtype=dtype) for layer in self.layers))

    @property
    def nbytes(self) -> int:
        """Bytes that all tensors of the state take."""
        return sum(tensor.nbytes for layer in self.layers for tensor in layer)


torch.export.register_dataclass(ModelState, serialized_type_name="mambakit.ModelState")
