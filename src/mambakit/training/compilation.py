"""Whether a run compiles its blocks, decided once, and how it does."""

import importlib.util
import os
import shutil
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mambakit.models import MambaLM

_VARIANTS = 64


class Compilation(NamedTuple):
    """Whether ``torch.compile`` takes part in a run.

    Attributes:
        on: Whether it does.
        why_not: A clause for the reader, if it could be expected to and does not.
    """

    on: bool
    why_not: str | None = None


def _missing() -> str | None:
    """Say what ``torch.compile`` lacks to make kernels for a GPU, or ``None``."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    # Triton builds the launcher of each kernel with the machine's C compiler
    compilers = (os.environ.get("CC"), "gcc", "clang", "cc")
    if not any(name and shutil.which(name) for name in compilers):
        return "Triton needs a C compiler, and there is none"
    return None


def resolve_compilation(asked: bool | None, device: torch.device) -> Compilation:
    """Settle whether to compile: as asked, else on a GPU that can.

    Raises:
        RuntimeError: It is asked for, on a GPU, and cannot be done.
    """
    missing = _missing() if device.type == "cuda" and asked is not False else None
    if asked and missing is not None:
        raise RuntimeError(f"training.compile cannot be used: {missing}")
    if asked is None:
        return Compilation(device.type == "cuda" and missing is None, missing)
    return Compilation(asked)


def compile_blocks(model: MambaLM, *, backend: str | Callable = "inductor") -> None:
    """Let ``torch.compile`` fuse what is around the operators, block by block.

    All blocks are one program with other weights, so that one compilation serves them all; the
    whole stack as one graph would take as many times longer as it has layers. Names of
    parameters stay what they are. ``backend`` is ``torch.compile``'s.
    """
    from torch._dynamo import config  # importing it takes seconds, which few processes need

    # All models of a process share the blocks' code, and each has some variants of it: without
    # a state before it or with one, with gradients or without. The default stops at 8.
    config.recompile_limit = max(config.recompile_limit, _VARIANTS)
    # training.precision decides how products are rounded, and the compiler need not advise
    warnings.filterwarnings("ignore", "TensorFloat32 tensor cores", UserWarning)
    for block in model.backbone.layers:
        block.compile(fullgraph=True, dynamic=False, backend=backend)


def let_rows_vary(*tensors: Tensor) -> None:
    """Let what is compiled for these tensors serve any number of rows.

    Every batch of documents has another number of sequences, and each would be compiled anew.
    """
    for tensor in tensors:
        torch._dynamo.maybe_mark_dynamic(tensor, 0)
