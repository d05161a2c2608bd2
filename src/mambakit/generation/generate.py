"""The loop: read the prompt in one pass, then one step for each new token."""

from collections.abc import Iterable, Iterator, Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from mambakit.models import MambaLM

from .sampling import SamplingRules, is_whole


def generate(
    model: MambaLM,
    tokens: Int[Tensor, "b l"],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    vocab_size: int | None = None,
    stop_tokens: Sequence[int] = (),
    seed: int | None = None,
    generator: torch.Generator | None = None,
) -> Int[Tensor, "b l_out"]:
    """Continue each row of ``tokens`` by up to ``max_new_tokens`` tokens.

        token_{t+1} ~ softmax(rules(logits_t))

    The rules apply in this order: repetition penalty, temperature, top-k, top-p, min-p. Ids
    from ``vocab_size`` on are never chosen, before any rule. Time for each new token
    does not depend on how many there are already.

    Args:
        model: The language model.
        tokens: Prompts of one length, at least 1, on the model's device.
        max_new_tokens: New tokens for each row, at most; 0 gives ``tokens`` back.
        temperature: Divides the logits; 0 takes the most likely token each time.
        top_k: Only the ``k`` most likely tokens; ``None`` means all.
        top_p: Only the most likely tokens that make up this probability; ``None`` means all.
        min_p: Only tokens at least this many times as likely as the likeliest; ``None`` means
            all.
        repetition_penalty: Above 1, tokens of the prompt and of the continuation so far get
            less likely.
        vocab_size: Only ids below it are chosen, such as those that a tokenizer knows of a
            model that has more; ``None`` means ``config.vocab_size``.
        stop_tokens: A row ends with the first of these it produces, and repeats it until all
            rows have ended.
        seed: Same seed, same tokens, on the same device; at least -2**63 and below 2**64.
            ``None`` means torch's global state.
        generator: Source of chance, instead of a seed.

    Returns:
        Prompts and continuations, int64. Fewer than ``max_new_tokens`` are new where every row
        has ended.

    Raises:
        ValueError: A setting breaks its rule, a prompt is empty, or a token is outside the
            vocabulary.

    Example:
        >>> from mambakit import MambaConfig, MambaLM
        >>> model = MambaLM(MambaConfig(d_model=16, n_layer=1, vocab_size=30))
        >>> prompt = torch.tensor([[1, 2, 3]])
        >>> more = generate(model, prompt, max_new_tokens=4, temperature=0)
        >>> more.shape
        torch.Size([1, 7])
        >>> bool(more[0, 3] == model(prompt).logits[0, -1, :30].argmax())
        True
    """
    steps = stream(
        model,
        tokens,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        vocab_size=vocab_size,
        stop_tokens=stop_tokens,
        seed=seed,
        generator=generator,
    )
    return torch.cat([tokens.long(), *(step[:, None] for step in steps)], dim=1)


def stream(
    model: MambaLM,
    tokens: Int[Tensor, "b l"],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    vocab_size: int | None = None,
    stop_tokens: Sequence[int] = (),
    seed: int | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[Int[Tensor, " b"]]:
    """Yield the tokens of ``generate`` as they are chosen, one for each row at a time.

    Arguments are those of ``generate`` and are checked at once, before the first token is asked
    for. Dropping the iterator ends the work.

    Raises:
        ValueError: As ``generate``.

    Example:
        >>> from mambakit import MambaConfig, MambaLM
        >>> model = MambaLM(MambaConfig(d_model=16, n_layer=1, vocab_size=30))
        >>> prompt = torch.tensor([[1, 2, 3]])
        >>> steps = list(stream(model, prompt, max_new_tokens=4, seed=0))
        >>> whole = generate(model, prompt, max_new_tokens=4, seed=0)
        >>> torch.equal(torch.stack(steps, dim=1), whole[:, 3:])
        True
    """
    rules = SamplingRules(temperature, top_k, top_p, min_p, repetition_penalty)
    _check_prompt(model, tokens)
    if not is_whole(max_new_tokens) or max_new_tokens < 0:
        raise ValueError(
            "generate: max_new_tokens must be a whole number of at least 0, "
            f"got {max_new_tokens!r}"
        )
    known = model.config.vocab_size
    if vocab_size is None:
        vocab_size = known
    if not is_whole(vocab_size) or not 1 <= vocab_size <= known:
        raise ValueError(
            f"generate: vocab_size must be a whole number from 1 to the model's {known}, "
            f"got {vocab_size!r}"
        )
    if not isinstance(stop_tokens, Iterable):
        raise ValueError(f"generate: stop_tokens must be a list of ids, got {stop_tokens!r}")
    for token in stop_tokens:
        if not is_whole(token) or not 0 <= token < known:
            raise ValueError(f"generate: stop_tokens must be in [0, {known}), got {token!r}")
    if seed is not None:
        if generator is not None:
            raise ValueError("generate: seed and generator must not both be given")
        if not -(2**63) <= seed < 2**64:
            raise ValueError(
                f"generate: seed must be at least -2**63 and below 2**64, got {seed}"
            )
        generator = torch.Generator(tokens.device).manual_seed(seed)
    return _steps(
        model, tokens, max_new_tokens, rules, vocab_size, tuple(stop_tokens), generator
    )


@torch.inference_mode()
def _steps(
    model: MambaLM,
    tokens: Tensor,
    max_new_tokens: int,
    rules: SamplingRules,
    vocab_size: int,
    stop_tokens: tuple[int, ...],
    generator: torch.Generator | None,
) -> Iterator[Tensor]:
    b = tokens.shape[0]
    seen = None
    if rules.repetition_penalty != 1:
        # a prompt may hold ids that are not chosen
        seen = torch.zeros(b, model.config.vocab_size, dtype=torch.bool, device=tokens.device)
        seen.scatter_(1, tokens.long(), True)
    ends = torch.tensor(stop_tokens, device=tokens.device) if stop_tokens else None
    ended = torch.zeros(b, dtype=torch.bool, device=tokens.device)

    state = None
    chosen: Tensor | None = None
    for _ in range(max_new_tokens):
        logits, state = model(tokens, state, last_only=True)
        met = None if seen is None else seen[:, :vocab_size]
        fresh = rules.choose(logits[:, -1, :vocab_size], met, generator)
        if ends is not None and chosen is not None:
            fresh = torch.where(ended, chosen, fresh)
        chosen = fresh
        yield chosen
        if ends is not None:
            ended = ended | torch.isin(chosen, ends)
            if ended.all():
                return
        tokens = chosen[:, None]
        if seen is not None:
            seen.scatter_(1, tokens, True)


def _check_prompt(model: MambaLM, tokens: Tensor) -> None:
    if not isinstance(tokens, Tensor):
        raise ValueError(f"generate: tokens must be a tensor, got {type(tokens).__name__}")
    if tokens.ndim != 2 or tokens.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"generate: tokens must be int64 or int32 of shape (b, l), "
            f"got {str(tokens.dtype).removeprefix('torch.')} of shape {tuple(tokens.shape)}"
        )
    if 0 in tokens.shape:
        raise ValueError(
            f"generate: tokens must hold at least one token in at least one row, "
            f"got shape {tuple(tokens.shape)}"
        )
    if tokens.device != model.device:
        raise ValueError(
            f"generate: tokens must be on {model.device} like the model, got {tokens.device}"
        )
    # The only look into a tensor: an id beyond the embedding would end in an error of its own
    # on the CPU, and spoil the whole process on a GPU.
    low, high = (int(bound) for bound in tokens.aminmax())
    vocab_size = model.config.vocab_size
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"generate: tokens must be in [0, {vocab_size}), got {low if low < 0 else high}"
        )
