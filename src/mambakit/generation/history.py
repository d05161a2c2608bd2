"""Going back: the states after each of the last tokens."""

from dataclasses import dataclass, field

from mambakit.models import ModelState

from .sampling import is_whole


@dataclass(frozen=True, eq=False)
class StateHistory:
    """Keep the states after each of the last ``depth`` tokens, to go back to any of them.

    Going back computes nothing and is exact, because no call of a model changes the state that
    it was given: a history only holds on to the states that decoding leaves behind anyway. It
    is a value itself: ``push`` and ``rewind`` return a new one and share the states.

    Attributes:
        state: The state after the newest token.
        depth: How many tokens it can go back at most; it takes ``depth + 1`` states' memory.
        older: The states before that, oldest first.

    Raises:
        ValueError: ``depth`` is negative or no whole number, or a state is none.

    Example:
        >>> import torch
        >>> from mambakit import MambaConfig, MambaLM
        >>> model = MambaLM(MambaConfig(d_model=16, n_layer=1, vocab_size=32))
        >>> history = StateHistory(model(torch.tensor([[1, 2, 3]])).state, depth=4)
        >>> for token in (4, 5, 6):
        ...     history = history.push(model(torch.tensor([[token]]), history.state).state)
        >>> back = history.rewind(2)
        >>> again = model(torch.tensor([[1, 2, 3, 4]])).state
        >>> torch.testing.assert_close(back.state.layers[0].ssm, again.layers[0].ssm)
    """

    state: ModelState
    depth: int
    older: tuple[ModelState, ...] = field(default=(), kw_only=True)

    def __post_init__(self) -> None:
        if not is_whole(self.depth) or self.depth < 0:
            raise ValueError(
                f"StateHistory: depth must be a whole number of at least 0, got {self.depth!r}"
            )
        for state in (self.state, *self.older):
            if not isinstance(state, ModelState):
                raise ValueError(
                    f"StateHistory: state must be a ModelState, got {type(state).__name__}"
                )

    def __len__(self) -> int:
        """Return how many tokens it can go back now."""
        return len(self.older)

    def push(self, state: ModelState) -> "StateHistory":
        """Return the history with the state after one more token; the oldest may fall out.

        Raises:
            ValueError: ``state`` is no state.
        """
        older = (*self.older, self.state)
        return StateHistory(state, self.depth, older=older[max(0, len(older) - self.depth) :])

    def rewind(self, tokens: int) -> "StateHistory":
        """Return the history as it was ``tokens`` tokens ago.

        Raises:
            ValueError: It does not reach back so far.
        """
        if not is_whole(tokens) or not 0 <= tokens <= len(self.older):
            raise ValueError(
                f"rewind: tokens must be from 0 to {len(self.older)}, which is how far this "
                f"history reaches back, got {tokens!r}"
            )
        states = (*self.older, self.state)
        states = states[: len(states) - tokens]
        return StateHistory(states[-1], self.depth, older=states[:-1])

    @property
    def nbytes(self) -> int:
        """Bytes of memory that all the states hold; shared memory counts once."""
        layers = tuple(layer for state in (*self.older, self.state) for layer in state.layers)
        return ModelState(layers).nbytes
