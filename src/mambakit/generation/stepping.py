"""The inner step of every way to decode: one more token for each row."""

from collections.abc import Callable

from jaxtyping import Float, Int
from torch import Tensor

from mambakit.models import MambaLM, ModelState

from . import cpu_step

Step = Callable[[Int[Tensor, " b"], ModelState], tuple[Float[Tensor, "b v"], ModelState]]
"""Reads one token for each row: ``logits, state = step(tokens, state)``."""


def stepper(model: MambaLM) -> Step:
    """Return the step of a model.

        logits, state = step(tokens, state)     is     model(tokens[:, None], state)

    The step may be of any number of rows at each call: rows leave a batch when they end. On a
    CPU it is one compiled call, where ``cpu_step.refusal`` has nothing against the model; it
    gives no gradients, so it is for ``torch.no_grad`` or ``torch.inference_mode``.

    Example:
        >>> import torch
        >>> from mambakit import MambaConfig
        >>> model = MambaLM(MambaConfig(d_model=16, n_layer=2, vocab_size=32))
        >>> tokens = torch.randint(32, (3, 10))
        >>> with torch.no_grad():
        ...     logits, _ = stepper(model)(tokens[:, 9], model(tokens[:, :9]).state)
        ...     torch.testing.assert_close(logits, model(tokens).logits[:, 9])
    """
    if cpu_step.refusal(model) is None:
        return cpu_step.CPUStep(model)

    def step(tokens: Tensor, state: ModelState) -> tuple[Tensor, ModelState]:
        logits, state = model(tokens[:, None], state, last_only=True)
        return logits[:, 0], state

    return step
