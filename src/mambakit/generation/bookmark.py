"""Where a text was left: a state, and the tokens that it has not read yet."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mambakit.models import MambaConfig, ModelState
from mambakit.models.state_file import read_layers, write_layers

REMEMBERED = 256
"""How many of the tokens read last a bookmark keeps."""

# What is kept beside the state: the axis that each tensor has after the first.
_AXES = {"unread": "u", "recent": "r", "written": ""}
_NONE = -1


@dataclass(frozen=True, eq=False)
class Bookmark:
    """Hold the place where some texts were left, to go on from there at any time.

    The last token of a text has been chosen but not read, since nothing has been asked after
    it: so a text is its ``state`` and its ``unread`` token. The tokens before that one tell how
    the text goes on from there, as text: which word a space comes after, which character has
    only begun, which stop string.

    Attributes:
        state: What has been read, one sequence for each text.
        unread: The tokens that come next, in each text.
        recent: The tokens that have been read last, up to 256 of each text, with -1 in front
            where there are fewer; ``None`` where nobody knows them.
        written: How many of the last tokens, with the unread one, were written since the
            prompt; 0 where a stop token or stop string came after them. ``None`` means 0.

    Raises:
        ValueError: There are not as many rows of tokens as sequences in ``state``.

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
    recent: Int[Tensor, "b r"] | None = field(default=None, kw_only=True)
    written: Int[Tensor, " b"] | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        rows = len(self.state)
        for name, axis, tokens in self._parts():
            if tokens.ndim != len(axis) + 1 or len(tokens) != rows:
                shape = f"({rows}, {axis})" if axis else f"({rows},)"
                raise ValueError(
                    f"Bookmark: {name} must be of shape {shape} like the state, "
                    f"got {tuple(tokens.shape)}"
                )

    def _parts(self) -> Iterable[tuple[str, str, Tensor]]:
        """Yield the tensors beside the state: their names, their axis after the first."""
        for name, axis in _AXES.items():
            tokens = getattr(self, name)
            if tokens is not None:
                yield name, axis, tokens

    @classmethod
    def of_texts(
        cls, state: ModelState, texts: Sequence[Int[Tensor, " _"]], written: Sequence[int]
    ) -> "Bookmark":
        """Return the place after ``texts``, of which ``state`` has read all but the last token.

        Example:
            >>> from mambakit import MambaConfig, MambaLM
            >>> model = MambaLM(MambaConfig(d_model=16, n_layer=1, vocab_size=32))
            >>> text = torch.tensor([1, 2, 3])
            >>> place = Bookmark.of_texts(model(text[None, :-1]).state, [text], [1])
            >>> place.recent.tolist(), place.unread.tolist()
            ([[1, 2]], [[3]])
        """
        unread = torch.stack([text[-1:] for text in texts])
        recent = pad_sequence(
            [text[-1 - REMEMBERED : -1] for text in texts],
            batch_first=True,
            padding_value=_NONE,
            padding_side="left",
        )
        return cls(state, unread, recent=recent, written=unread.new_tensor(written))

    def remembered(self) -> list[Int[Tensor, " _"]]:
        """Return the last tokens that each text has read, as far as they are known."""
        if self.recent is None:
            return [self.unread[0, :0]] * len(self)
        counts = (self.recent != _NONE).sum(dim=1).tolist()
        width = self.recent.shape[1]
        return [row[width - n :] for row, n in zip(self.recent, counts, strict=True)]

    def __len__(self) -> int:
        """Return the number of texts."""
        return len(self.state)

    def __getitem__(self, index: int | slice | Sequence[int] | Tensor) -> "Bookmark":
        """Return the places of some of the texts, as ``ModelState`` does."""
        one: Any = index
        if isinstance(index, Tensor) and not index.ndim:
            one = index.item()
        state = self.state[one]
        rows: slice | list[int] | Tensor
        if isinstance(one, slice | Tensor):
            rows = one
        elif isinstance(one, Iterable):
            rows = list(one)
        else:
            rows = slice(int(one), int(one) + 1 or None)
        return Bookmark(state, **{name: part[rows] for name, _, part in self._parts()})

    def fork(self, k: int) -> "Bookmark":
        """Return ``k`` texts that all go on from this one, as ``ModelState.fork`` does."""
        state = self.state.fork(k)  # which refuses what is no number of forks
        forks = {name: part.expand(k, *part.shape[1:]) for name, _, part in self._parts()}
        return Bookmark(state, **forks)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the place to a safetensors file, whole or not at all.

        Raises:
            RuntimeError: The file cannot be written; the message says why.
        """
        write_layers(path, self.state.layers, {name: part for name, _, part in self._parts()})

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
        nothing = torch.empty(len(state), 0, dtype=torch.int64, device=device)
        tokens = {"unread": nothing, **extra}
        for name, part in tokens.items():
            known = name in _AXES and part.dtype == torch.int64
            if not known or part.ndim != len(_AXES[name]) + 1 or len(part) != len(state):
                raise ValueError(f"load: {path} must hold a state and its unread tokens alone")
        return cls(state, **tokens)
