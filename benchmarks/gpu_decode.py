"""New tokens on a GPU, greedy, after a prompt of 2048, beside what the memory allows and peers.

A token's time is that of ``generate``: the step, the choice of the token and all that the host
does. The floor is to move the parameters once and the state in and out once, at the rate of a
large copy. Beside it: a Llama of the same size, compiled, in a CUDA graph, with cuDNN's
attention over as many entries (its step alone), and mamba_ssm with its own graphs where it is
installed.
"""

import gc
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mambakit import MambaConfig, MambaLM
from mambakit.generation import complete, generate
from mambakit.generation.gpu_step import GPUStep

from . import gpu
from .llama import LlamaStep, shape_like
from .peers import VOCABULARY
from .rows import Check, Row

PROMPT, NEW = 2048, 128
FLOOR = "floor"
LLAMA, PEER = "Llama, compiled", "mamba_ssm"
_CHECKED = 96
_LIMIT = 1.5  # times the error of the model's own forward


class Case(NamedTuple):
    """A model's size, a batch's, and what the step reads."""

    name: str
    batch: int
    weights: str | None = None

    def __str__(self) -> str:
        return f"{self.name}, batch {self.batch}, {self.weights or 'bf16'}"


CASES = [
    *(Case("1.4B", b) for b in (1, 16, 64, 128)),
    *(Case("2.8B", b) for b in (1, 64)),
    *(Case("130M", b) for b in (1, 16, 64, 128)),
    Case("1.4B", 1, "int8"),
]
READING = f"1.4B, batch 16, prefill of {PROMPT:,} tokens"


def run(rounds: int, cases: str = "") -> Iterator[Row]:
    """Yield each case's rows, and then those of reading prompts."""
    for name in dict.fromkeys(case.name for case in CASES):
        wanted = [c for c in CASES if c.name == name and cases in str(c)]
        reads = READING.startswith(name) and cases in READING
        if not wanted and not reads:
            continue
        model = _model(name)
        for case in wanted:
            yield from _decode(model, case, _check(model, case), rounds)
        if reads:
            yield from _read(model, rounds)
        del model
        _clear()


def _decode(model: MambaLM, case: Case, check: Check, rounds: int) -> Iterator[Row]:
    nbytes = GPUStep(model, case.weights).nbytes + 2 * _state_bytes(model, case.batch)

    def row(subject: str, samples: list[float], check: Check | None = None) -> Row:
        milliseconds = [1e3 * s for s in samples]
        return Row("gpu decode", str(case), subject, "ms", milliseconds, check=check)

    yield row("mambakit", _a_token(_ours(model, case), rounds), check)
    yield row("mambakit, step alone", _step_alone(model, case, rounds))
    yield row(FLOOR, [nbytes / gpu.bytes_a_second()] * rounds)
    if case.weights is not None:
        return
    yield row(LLAMA, _llama(model, case.batch, rounds))
    _clear()
    if importlib.util.find_spec("mamba_ssm") is not None:
        yield row(PEER, _a_token(_mamba_ssm(model, case.batch), rounds))
        _clear()


def _model(name: str) -> MambaLM:
    torch.manual_seed(0)
    config = MambaConfig.published(name.lower())
    return MambaLM(config, device=gpu.DEVICE, dtype=torch.bfloat16).requires_grad_(False)


def _prompt(b: int, l: int = PROMPT) -> Tensor:
    chance = torch.Generator().manual_seed(0)
    return torch.randint(VOCABULARY, (b, l), generator=chance).to(gpu.DEVICE)


def _clear() -> None:
    torch.compiler.reset()
    gc.collect()  # modules and what compiled them hold each other
    torch.cuda.empty_cache()


def _state_bytes(model: MambaLM, b: int) -> int:
    config = model.config
    a_row = config.d_inner * (4 * config.d_state + 2 * (config.d_conv - 1))
    return config.n_layer * b * a_row


@torch.inference_mode()
def _check(model: MambaLM, case: Case) -> Check:
    """Compare the last token's logits with float32's, as the model's own forward's are."""
    tokens = _prompt(case.batch, _CHECKED)
    exact_model = MambaLM(model.config, device=gpu.DEVICE).requires_grad_(False)
    exact_model.load_state_dict(model.state_dict())
    exact = exact_model(tokens, last_only=True).logits[:, 0]
    eager = model(tokens, last_only=True).logits[:, 0].float()
    state = model(tokens[:, : _CHECKED // 2]).state
    step = GPUStep(model, case.weights)
    for t in range(_CHECKED // 2, _CHECKED):
        logits, state = step(tokens[:, t], state)
    what = f"error of logits after {_CHECKED // 2} steps over that of a bf16 forward"
    # int8 weights are other weights: their quality is another benchmark's
    limit = _LIMIT if case.weights is None else 50.0
    return Check(what, float((logits - exact).norm() / (eager - exact).norm()), limit)


def _ours(model: MambaLM, case: Case) -> Callable[[int], object]:
    prompt = _prompt(case.batch)
    # without the reading, whose time varies by more than a token's
    state = complete(model, list(prompt), max_new_tokens=0).bookmark.state

    def decode(new: int) -> object:
        return generate(
            model,
            prompt[:, -1:],
            state=state,
            max_new_tokens=new,
            temperature=0,
            weights=case.weights,
        )

    return decode


def _mamba_ssm_model(model: MambaLM) -> Any:
    from mamba_ssm.models.config_mamba import MambaConfig as PeerConfig
    from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel

    config = PeerConfig(
        d_model=model.config.d_model, n_layer=model.config.n_layer, vocab_size=VOCABULARY
    )
    return MambaLMHeadModel(config, device=gpu.DEVICE, dtype=torch.bfloat16)


def _mamba_ssm(model: MambaLM, b: int) -> Callable[[int], object]:
    peer, prompt = _mamba_ssm_model(model), _prompt(b)
    return lambda new: peer.generate(prompt, PROMPT + new, cg=True, top_k=1)


def _a_token(decode: Callable[[int], object], rounds: int) -> list[float]:
    """Return the time of a new token: what NEW of them take beyond the first."""
    for new in (1, NEW + 1):
        decode(new)
    return [
        (gpu.seconds(lambda: decode(NEW + 1)) - gpu.seconds(lambda: decode(1))) / NEW
        for _ in range(rounds)
    ]


def _step_alone(model: MambaLM, case: Case, rounds: int) -> list[float]:
    step, tokens = GPUStep(model, case.weights), _prompt(case.batch, 1)[:, 0]

    @torch.inference_mode()
    def several() -> None:
        state = None
        for _ in range(NEW):
            _, state = step(tokens, state)

    several()
    return [gpu.seconds(several) / NEW for _ in range(rounds)]


def _llama(model: MambaLM, b: int, rounds: int) -> list[float]:
    config = model.config
    shape = shape_like(config.d_model, config.n_layer, VOCABULARY)
    length = PROMPT + NEW // 2
    step = LlamaStep(shape, b, length, device=gpu.DEVICE, dtype=torch.bfloat16)
    tokens = _prompt(b, 1)[:, 0]
    replay = gpu.Replay([lambda: step(tokens)])
    return [replay.seconds(NEW) for _ in range(rounds)]


def _read(model: MambaLM, rounds: int) -> Iterator[Row]:
    prompt = _prompt(16)
    calls: dict[str, gpu.Call] = {"mambakit": lambda: model(prompt, last_only=True)}
    if importlib.util.find_spec("transformers") is not None:
        llama = _llama_reader(model)
        calls[LLAMA] = lambda: llama(prompt, logits_to_keep=1)
    if importlib.util.find_spec("mamba_ssm") is not None:
        peer = _mamba_ssm_model(model)
        calls[PEER] = lambda: peer(prompt, num_last_tokens=1)
    with torch.inference_mode():
        for call in calls.values():
            call()
            call()
        samples = {
            name: [gpu.seconds(call) for _ in range(rounds)] for name, call in calls.items()
        }
    for subject, times in samples.items():
        yield Row("gpu decode", READING, subject, "ms", [1e3 * s for s in times])


def _llama_reader(model: MambaLM) -> Callable[..., object]:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = shape_like(model.config.d_model, model.config.n_layer, VOCABULARY)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=shape.width,
        intermediate_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.width // 64,
        max_position_embeddings=PROMPT,
        tie_word_embeddings=True,
        use_cache=False,
        attn_implementation="sdpa",
    )
    with torch.device(gpu.DEVICE):
        llama = LlamaForCausalLM(config).to(torch.bfloat16)
    for layer in llama.model.layers:
        layer.compile()
    return llama
