"""Prompts as rows of tokens: what they may be, and how they are read."""

from collections import defaultdict
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int, Integer
from torch import Tensor

from mambakit.data import Tokenizer
from mambakit.models import LMOutput, MambaLM, ModelState
from mambakit.ops._packing import arrange

from .bookmark import Bookmark

Rows = list[Int[Tensor, " _"]]


def as_rows(
    model: MambaLM,
    prompts: Int[Tensor, "b l"] | Sequence[Int[Tensor, " _"]] | Sequence[str],
    tokenizer: Tokenizer | None = None,
) -> Rows:
    """Return prompts as a list of int64 rows on the model's device, each of any length.

    Raises:
        ValueError: They are something else, there are none, a token is outside the vocabulary,
            or texts come without a tokenizer.
    """
    if isinstance(prompts, Tensor):
        if prompts.ndim != 2:
            raise ValueError(_wanted(prompts))
        rows = list(prompts.unbind())
        if not rows:
            raise ValueError(
                "generate: tokens must hold at least one token in at least one row, "
                f"got shape {tuple(prompts.shape)}"
            )
    elif isinstance(prompts, str) or not isinstance(prompts, Sequence) or not prompts:
        raise ValueError(
            "generate: prompts must be a tensor (b, l) or a list of at least one row of tokens "
            f"or one text, got {prompts!r}"
        )
    elif isinstance(prompts[0], str):
        if tokenizer is None:
            raise ValueError("generate: tokenizer must be given with prompts that are texts")
        rows = [_encode(tokenizer, text).to(model.device) for text in prompts]
    else:
        rows = [row for row in prompts if isinstance(row, Tensor)]
        if len(rows) < len(prompts):
            other = next(row for row in prompts if not isinstance(row, Tensor))
            raise ValueError(
                f"generate: prompts must all be tensors or all be texts, got {other!r}"
            )
    for row in rows:
        if row.ndim != 1 or row.dtype not in (torch.int64, torch.int32):
            raise ValueError(_wanted(prompts if isinstance(prompts, Tensor) else row))
        if row.device != model.device:
            raise ValueError(
                f"generate: tokens must be on {model.device} like the model, got {row.device}"
            )
    _check_ids(model, rows)
    return [row.long() for row in rows]


def _wanted(got: Tensor) -> str:
    return (
        "generate: tokens must be int64 or int32 of shape (b, l), or rows of them, "
        f"got {str(got.dtype).removeprefix('torch.')} of shape {tuple(got.shape)}"
    )


def _encode(tokenizer: Tokenizer, text: object) -> Tensor:
    if not isinstance(text, str):
        raise ValueError(f"generate: prompts must all be tensors or all be texts, got {text!r}")
    return torch.as_tensor(tokenizer.encode(text), dtype=torch.int64)


def _check_ids(model: MambaLM, rows: Rows) -> None:
    # The only look into a prompt: an id beyond the embedding would end in an error of its own
    # on the CPU, and spoil the whole process on a GPU.
    every = torch.cat(rows)
    if not len(every):
        return
    low, high = (int(bound) for bound in every.aminmax())
    vocab_size = model.config.vocab_size
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"generate: tokens must be in [0, {vocab_size}), got {low if low < 0 else high}"
        )


def without_padding(
    tokens: Int[Tensor, "b l"],
    attention_mask: Bool[Tensor, "b l"] | Integer[Tensor, "b l"] | None,
    lengths: Int[Tensor, " b"] | None,
) -> Tensor | Rows:
    """Return the tokens of each row that are no padding; without mask and lengths, all.

    Raises:
        ValueError: Both are given, or the one that is does not fit, as the operations say.

    Example:
        >>> tokens = torch.tensor([[0, 0, 5], [6, 7, 8]])
        >>> without_padding(tokens, torch.tensor([[0, 0, 1], [1, 1, 1]]), None)
        [tensor([5]), tensor([6, 7, 8])]
    """
    if tokens.ndim != 2:
        return tokens  # ``as_rows`` says what is wrong with them
    b, l = tokens.shape
    _, packing = arrange("generate", b, l, tokens.device, None, lengths, attention_mask)
    if packing is None:
        return tokens
    kept = tokens.flatten().index_select(0, packing.places)
    return list(kept.split(packing.cu_seqlens.diff().tolist()))


def begin(
    model: MambaLM, rows: Rows | None, state: ModelState | Bookmark | None
) -> tuple[Rows, ModelState | None]:
    """Return the tokens that are to be read, and the state that they come after.

    A bookmark's unread tokens come before the prompts, which may then be missing.

    Raises:
        ValueError: Nothing is left to be read in a row, or the state is of another number of
            sequences than the prompts, on another device, or no state.
    """
    if isinstance(state, Bookmark):
        unread = as_rows(model, state.unread)
        if rows is not None:
            _check_count(len(state.state), len(rows))
            unread = [torch.cat(pair) for pair in zip(unread, rows, strict=True)]
        rows, state = unread, state.state
    if rows is None:
        raise ValueError("generate: prompts must be given, unless a bookmark is, got None")
    for i, row in enumerate(rows):
        if not len(row):
            raise ValueError(
                f"generate: tokens must hold at least one token, got none in row {i}"
            )
    if state is not None:
        if not isinstance(state, ModelState):
            raise ValueError(
                "generate: state must be a ModelState, a Bookmark or None, "
                f"got {type(state).__name__}"
            )
        _check_count(len(state), len(rows))
        device = state.layers[0].ssm.device
        if device != model.device:
            raise ValueError(
                f"generate: state must be on {model.device} like the model, got {device}"
            )
    return rows, state


def _check_count(state: int, prompts: int) -> None:
    if state != prompts:
        raise ValueError(
            f"generate: state must hold one sequence for each prompt, {prompts}, got {state}"
        )


def read(
    model: MambaLM, rows: Rows, state: ModelState | None, samples: int = 1
) -> tuple[Float[Tensor, "bs v"], ModelState]:
    """Read rows of any lengths; return the next token's logits and the states after them.

    Rows of one length are read together, in one pass, and nothing is padded. Each row comes
    back ``samples`` times in succession, though it is read once.
    """
    parts, order = _read_by_length(model, rows, state)
    logits = torch.cat([part.logits[:, 0] for part in parts])
    after = _join(parts)
    if len(rows) == 1 and samples > 1:
        return logits.expand(samples, -1), after.fork(samples)
    if len(parts) > 1 or samples > 1:
        at = [i for i in order for _ in range(samples)]
        return logits[at], after[at]
    return logits, after


def skim(model: MambaLM, rows: Rows, state: ModelState | None, samples: int = 1) -> ModelState:
    """Read rows of any lengths, also of none, for the states after them alone."""
    parts, order = _read_by_length(model, rows, state)
    return _join(parts)[[i for i in order for _ in range(samples)]]


def _read_by_length(
    model: MambaLM, rows: Rows, state: ModelState | None
) -> tuple[list[LMOutput], list[int]]:
    """Read the rows of each length together; return also where each row has come to lie."""
    groups: dict[int, list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        groups[len(row)].append(i)
    parts = []
    for group in groups.values():
        before = state if state is None or len(groups) == 1 else state[group]
        parts.append(model(torch.stack([rows[i] for i in group]), before, last_only=True))
    lying = [i for group in groups.values() for i in group]
    return parts, sorted(range(len(rows)), key=lying.__getitem__)


def _join(parts: list[LMOutput]) -> ModelState:
    return parts[0].state if len(parts) == 1 else ModelState.cat([part.state for part in parts])
