"""The inner step of every way to decode: one more token for each row."""

from collections.abc import Callable

from jaxtyping import Float, Int
from torch import Tensor

from mambakit.models import MambaLM, ModelState

from . import cpu_step, gpu_step

Step = Callable[[Int[Tensor, " b"], ModelState], tuple[Float[Tensor, "b v"], ModelState]]
"""Reads one token for each row: ``logits, state = step(tokens, state)``."""


def stepper(model: MambaLM, weights: cpu_step.Weights | None = None) -> Step:
    """Return the step of a model.

        logits, state = step(tokens, state)     is     model(tokens[:, None], state)

    The step may be of any number of rows at each call: rows leave a batch when they end. On a
    GPU it is one CUDA graph, where ``gpu_step.refusal`` has nothing against the model, and on a
    CPU one compiled call, where ``cpu_step.refusal`` has nothing; elsewhere it is the model's
    own forward. The first two give no gradients: they are for ``torch.no_grad`` or
    ``torch.inference_mode``.

    Args:
        model: The language model.
        weights: ``"bf16"`` or ``"int8"`` rounds the matrices that the step reads, as
            ``CPUStep`` and ``GPUStep`` say; ``None`` reads the model's own.

    Raises:
        RuntimeError: The weights cannot be rounded here; the message says why.

    Example:
        >>> import torch
        >>> from mambakit import MambaConfig
        >>> model = MambaLM(MambaConfig(d_model=16, n_layer=2, vocab_size=32))
        >>> tokens = torch.randint(32, (3, 10))
        >>> with torch.no_grad():
        ...     logits, _ = stepper(model)(tokens[:, 9], model(tokens[:, :9]).state)
        ...     torch.testing.assert_close(logits, model(tokens).logits[:, 9])
    """
    why_no_gpu = gpu_step.refusal(model)
    if why_no_gpu is None:
        return gpu_step.GPUStep(model, weights)
    why_no_cpu = cpu_step.refusal(model)
    if why_no_cpu is None:
        return cpu_step.CPUStep(model, weights)
    if weights is not None:
        why = why_no_gpu if model.device.type == "cuda" else why_no_cpu
        raise RuntimeError(f"generate: weights must be None here, got {weights!r}: {why}")

    def step(tokens: Tensor, state: ModelState) -> tuple[Tensor, ModelState]:
        logits, state = model(tokens[:, None], state, last_only=True)
        return logits[:, 0], state

    return step


Reader = Callable[[Int[Tensor, "1 l"], ModelState], tuple[Float[Tensor, "1 l v"], ModelState]]
"""Reads a few tokens of one row at once: ``logits, states = read(tokens, state)``."""


def reader(model: MambaLM, weights: cpu_step.Weights | None = None) -> Reader:
    """Return what reads a few tokens of one row, and the weights once.

        logits, states = read(tokens, state)     is     model(tokens, state)

    Where it is one compiled call, the logits are those of as many steps, bit for bit, and
    ``states`` holds the state after each token; elsewhere only that after the last.

    Args:
        model: As in ``stepper``.
        weights: As in ``stepper``.

    Raises:
        RuntimeError: As ``stepper``.

    Example:
        >>> import torch
        >>> from mambakit import MambaConfig
        >>> model = MambaLM(MambaConfig(d_model=16, n_layer=2, vocab_size=32))
        >>> tokens = torch.randint(32, (1, 10))
        >>> with torch.no_grad():
        ...     logits, _ = reader(model)(tokens[:, 6:], model(tokens[:, :6]).state)
        ...     torch.testing.assert_close(logits, model(tokens).logits[:, 6:])
    """
    why = cpu_step.refusal(model)
    if why is None:
        return cpu_step.CPUStep(model, weights).read
    if weights is not None:
        raise RuntimeError(
            f"generate: weights must be None here with a draft, got {weights!r}: {why}"
        )
    return model
