"""AdamW with weight decay where it belongs, and its state by parameter name."""

import torch
from torch import Tensor, nn

from .config import TrainingConfig

MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def decays(parameter: nn.Parameter, *, embedding: bool, decay_embedding: bool) -> bool:
    """Say whether weight decay applies to a parameter.

    It does to weight matrices and convolution kernels. It does not to parameters marked
    ``_no_weight_decay`` (``A_log`` and ``D``: pulling them to zero would pull every channel
    to the same time constant), nor to biases and gains, nor, unless it is asked for, to
    embeddings, whose rows get gradients at very different rates.
    """
    if getattr(parameter, "_no_weight_decay", False) or parameter.ndim < 2:
        return False
    return decay_embedding or not embedding


def parameter_groups(model: nn.Module, training: TrainingConfig) -> list[dict]:
    """Sort a model's parameters into one group that decays and one that does not.

    Tied parameters are counted once. Both groups keep the order of ``named_parameters``.
    """
    embeddings = {
        id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)
    }
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for parameter in model.parameters():
        kind = decays(
            parameter,
            embedding=id(parameter) in embeddings,
            decay_embedding=training.decay_embedding,
        )
        groups[kind].append(parameter)
    return [
        {"params": groups[True], "weight_decay": training.weight_decay},
        {"params": groups[False], "weight_decay": 0.0},
    ]


def make_optimizer(model: nn.Module, training: TrainingConfig) -> torch.optim.AdamW:
    """Make AdamW over ``model``'s parameters. The rate is set at each step by the caller."""
    device = next(model.parameters()).device
    return torch.optim.AdamW(
        parameter_groups(model, training),
        lr=training.learning_rate,
        betas=training.betas,
        eps=training.eps,
        # one pass over the weights instead of one for each term; other devices lack it
        fused=device.type in {"cpu", "cuda"},
    )


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Give AdamW's moments as tensors named ``parameter.moment``; none before a first step."""
    return {
        f"{name}.{moment}": optimizer.state[parameter][moment]
        for name, parameter in model.named_parameters()
        if parameter in optimizer.state
        for moment in MOMENTS
    }


def load_optimizer_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]
) -> None:
    """Put moments back that ``optimizer_tensors`` gave, bit for bit.

    Raises:
        ValueError: A moment has another shape than its parameter, or is missing or unknown.
    """
    wrong = []
    expected = set()
    for name, parameter in model.named_parameters() if tensors else ():
        state = {}
        for moment in MOMENTS:
            key = f"{name}.{moment}"
            expected.add(key)
            tensor = tensors.get(key)
            shape = torch.Size() if moment == "step" else parameter.shape
            if tensor is None or tensor.shape != shape:
                wrong.append(key)
            else:
                state[moment] = tensor.to(parameter.device)
        optimizer.state[parameter] = state
    wrong += sorted(tensors.keys() - expected)
    if wrong:
        raise ValueError(
            "resume: the optimiser's state must fit the model, got "
            f"{len(wrong)} tensors that are missing, unknown or of another shape: "
            + ", ".join(wrong[:5])
        )
