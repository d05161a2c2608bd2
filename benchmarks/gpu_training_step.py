"""Training steps on a GPU, as ``mambakit train`` makes them, beside a Llama of the same size.

Forward, loss, backward, clipping and fused AdamW; float32 weights under bf16 autocast. The
Llama is transformers', with PyTorch's attention, its layers compiled one by one as ours are,
and once more as it comes.
mamba_ssm's own model is a row where it is installed.
"""

import contextlib
import gc
import importlib.util
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambakit import MambaConfig, MambaLM
from mambakit.data.batches import Batch
from mambakit.modules import Mamba
from mambakit.training.config import TrainingConfig
from mambakit.training.precision import resolve_machine
from mambakit.training.trainer import Learner

from . import gpu
from .peers import VOCABULARY
from .rows import Check, Row

# Tokens that are scored in float32 by PyTorch's own operations: the sequence's first, which
# nothing after them can change.
_CHECKED = 1024
_LIMIT = 2.0


class Case(NamedTuple):
    """A model's size and a batch's."""

    name: str
    d_model: int
    n_layer: int
    llama_layers: int
    llama_hidden: int
    batch: int
    length: int

    def __str__(self) -> str:
        return f"{self.name}, {self.batch} x {self.length:,} tokens"


CASES = [
    Case("370M", 1024, 48, 24, 2816, 16, 2048),
    Case("130M", 768, 24, 12, 2048, 32, 2048),
    Case("1.4B", 2048, 48, 24, 5632, 8, 2048),
    Case("370M", 1024, 48, 24, 2816, 1, 32768),
]


def run(rounds: int, cases: str = "") -> Iterator[Row]:
    """Yield the time of a step and its peak memory, of ours and then of each peer."""
    for case in CASES:
        if cases not in str(case):
            continue
        tokens = _draw(case)
        makers: dict[str, Callable[[Case, Tensor], _Step]] = {"mambakit": _Ours}
        if importlib.util.find_spec("transformers") is not None:
            makers["Llama, compiled"] = _Llama
            makers["Llama, eager"] = partial(_Llama, compiles=False)
        if importlib.util.find_spec("mamba_ssm") is not None:
            makers["mamba_ssm"] = _MambaSSM
        # Two models of this size do not fit side by side, so the turns are of whole models.
        for subject, make in makers.items():
            step = make(case, tokens)
            check = step.check() if isinstance(step, _Ours) else None
            began = time.perf_counter()
            step()
            torch.cuda.synchronize()
            first = time.perf_counter() - began
            step()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            samples = [_seconds(step) for _ in range(rounds)]
            peak = torch.cuda.max_memory_allocated()
            yield Row(
                "gpu training step",
                str(case),
                subject,
                "s",
                samples,
                tokens=case.batch * case.length,
                check=check,
                note=f"first step {first:.0f} s",
            )
            yield Row("gpu training step", f"{case}, peak", subject, "GB", [peak / 1e9])
            del step
            torch.compiler.reset()
            gc.collect()  # modules and what compiled them hold each other
            torch.cuda.empty_cache()


def _draw(case: Case) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(VOCABULARY, (case.batch, case.length + 1), generator=generator)


def _seconds(call: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    began = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - began


class _Step(ABC):
    """A model and what it is trained on."""

    @abstractmethod
    def __call__(self) -> None:
        """Make one step."""


class _Ours(_Step):
    def __init__(self, case: Case, tokens: Tensor, chunk: int | None = None) -> None:
        training = TrainingConfig(
            steps=1, batch_size=case.batch, length=case.length, chunk=chunk, precision="bf16",
            device=gpu.DEVICE,
        )  # fmt: skip
        torch.manual_seed(0)
        config = MambaConfig(case.d_model, case.n_layer, VOCABULARY)
        machine = resolve_machine(gpu.DEVICE, "bf16")
        model = MambaLM(config, device=gpu.DEVICE)
        self.learner = Learner(model, _Always(tokens), training, machine)
        self.tokens = tokens[:, : chunk or case.length]

    def __call__(self) -> None:
        self.learner.step(1e-4)

    def check(self) -> Check:
        """Compare the compiled model's logits with those of PyTorch's own operations.

        The error against float32 may be twice that of bf16 autocast on those operations.
        """
        learner, model = self.learner, self.learner.model
        tokens = self.tokens.to(gpu.DEVICE)
        with learner.autocast():
            x, _ = model.backbone(tokens)  # the graph of a step, at its size
            mine = model.lm_head(x[:1, :_CHECKED]).detach().float()
            del x
        few = tokens[:1, :_CHECKED]
        with torch.no_grad(), torch.compiler.set_stance("force_eager"), _plain(model):
            exact = model(few).logits
            with learner.autocast():
                eager = model(few).logits.float()
        what = f"error of the first {_CHECKED} tokens' logits over eager bf16's"
        return Check(what, float((mine - exact).norm() / (eager - exact).norm()), _LIMIT)


@contextlib.contextmanager
def _plain(model: MambaLM) -> Iterator[None]:
    """Let every mixer run on PyTorch's own operations."""
    mixers = [m for m in model.modules() if isinstance(m, Mamba)]
    before = [m.backend for m in mixers]
    for mixer in mixers:
        mixer.backend = "parallel"
    try:
        yield
    finally:
        for mixer, backend in zip(mixers, before, strict=True):
            mixer.backend = backend


class _Always:
    """The same batch, again and again: what a step costs does not depend on the text."""

    def __init__(self, tokens: Tensor) -> None:
        self.batch = Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), fresh=True)

    def next(self) -> Batch:
        return self.batch

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Do nothing: the one batch has no place to go back to."""


class _Peer(_Step):
    """A peer's model as its users train it: PyTorch's loss on all logits, in float32."""

    def __init__(self, model: nn.Module, tokens: Tensor) -> None:
        self.model = model.train()
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        self.tokens = tokens.to(gpu.DEVICE)

    def __call__(self) -> None:
        with torch.autocast(gpu.DEVICE, torch.bfloat16):
            logits = self.model(self.tokens[:, :-1]).logits
        F.cross_entropy(logits.flatten(0, 1).float(), self.tokens[:, 1:].flatten()).backward()
        del logits
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


class _Llama(_Peer):
    def __init__(self, case: Case, tokens: Tensor, *, compiles: bool = True) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=case.d_model,
            intermediate_size=case.llama_hidden,
            num_hidden_layers=case.llama_layers,
            num_attention_heads=case.d_model // 64,
            max_position_embeddings=case.length,
            tie_word_embeddings=True,
            use_cache=False,
            attn_implementation="sdpa",
        )
        with torch.device(gpu.DEVICE):
            model = LlamaForCausalLM(config)
        if compiles:
            for layer in model.model.layers:
                layer.compile()
        super().__init__(model, tokens)


class _MambaSSM(_Peer):
    def __init__(self, case: Case, tokens: Tensor) -> None:
        from mamba_ssm.models.config_mamba import MambaConfig as PeerConfig
        from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel

        config = PeerConfig(d_model=case.d_model, n_layer=case.n_layer, vocab_size=VOCABULARY)
        super().__init__(MambaLMHeadModel(config, device=gpu.DEVICE), tokens)
