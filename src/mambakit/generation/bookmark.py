"""Where a text was left: a state, and the tokens that it has not read yet."""

import os
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from mambakit.models import MambaConfig, ModelState
from mambakit.models.state_file import read_layers, write_layers

_UNREAD = "unread"


@dataclass(frozen=True, eq=False)
class Bookmark:
    """Hold the place where some texts were left, to go on from there at any time.

    The last token of a text has been chosen but not read, since nothing has been asked after
    it: so a text is its ``state`` and its ``unread`` token.

    Attributes:
        state: What has been read, one sequence for each text.
        unread: The tokens that come next, in each text.

    Raises:
        ValueError: There are not as many rows of ``unread`` as sequences in ``state``.

    Example:
        >>> from mambakit import MambaConfig, MambaLM
        >>> from mambakit.generation import complete
        >>> model = MambaLM(MambaConfig(d_model=16, n_layer=1, vocab_size=32))
        >>> prompt = torch.tensor([[1, 2, 3]])
        >>> first = complete(model, prompt, max_new_tokens=3, temperature=0)
        >>> then = complete(model, state=first.bookmark, max_new_tokens=2, temperature=0)
        >>> whole = complete(model, prompt, max_new_tokens=5, temperature=0)
        >>> torch.equal(torch.cat([first.tokens[0], then.tokens[0]]), whole.tokens[0])
        True
    """

    state: ModelState
    unread: Int[Tensor, "b u"]

    def __post_init__(self) -> None:
        if self.unread.ndim != 2 or len(self.unread) != len(self.state):
            raise ValueError(
                f"Bookmark: unread must be of shape ({len(self.state)}, u) like the state, "
                f"got {tuple(self.unread.shape)}"
            )

    def __len__(self) -> int:
        """Return the number of texts."""
        return len(self.state)

    def __getitem__(self, index: int | slice | list[int] | Tensor) -> "Bookmark":
        """Return the places of some of the texts, as ``ModelState`` does."""
        rows = slice(index, index + 1 or None) if isinstance(index, int) else index
        return Bookmark(self.state[index], self.unread[rows])

    def fork(self, k: int) -> "Bookmark":
        """Return ``k`` texts that all go on from this one, as ``ModelState.fork`` does."""
        return Bookmark(self.state.fork(k), self.unread.expand(k, -1))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the place to a safetensors file, whole or not at all.

        Raises:
            RuntimeError: The file cannot be written; the message says why.
        """
        write_layers(path, self.state.layers, {_UNREAD: self.unread})

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        device: torch.device | str | None = "cpu",
        config: MambaConfig | None = None,
    ) -> "Bookmark":
        """Read a place that ``save`` wrote, or a state of ``ModelState.save``: no unread token.

        Raises:
            ValueError: As ``ModelState.load``.
        """
        layers, extra = read_layers(path, device, config)
        state = ModelState(layers)
        unread = extra.pop(
            _UNREAD, torch.empty(len(state), 0, dtype=torch.int64, device=device)
        )
        whole = unread.ndim == 2 and len(unread) == len(state) and unread.dtype == torch.int64
        if extra or not whole:
            raise ValueError(f"load: {path} must hold a state and its unread tokens alone")
        return cls(state, unread)
