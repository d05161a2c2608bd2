"""What a compiled step has to know of the model that it stands for."""

import operator
from typing import Any

import torch
from torch import Tensor, nn

from mambakit.models import MambaLM, ModelState
from mambakit.models.backbone import Backbone
from mambakit.modules import Block, Linear, Mamba, RMSNorm
from mambakit.modules.mamba import StepProjection

# What a step computes in the place of these modules. Anything else has a forward of its own.
_KNOWN = {
    MambaLM, Backbone, Block, Mamba, RMSNorm, Linear, StepProjection,
    nn.Embedding, nn.Conv1d, nn.ModuleList,
}  # fmt: skip

_DTYPES = {torch.float32, torch.bfloat16, torch.float16}

_version = operator.attrgetter("_version")


def refusal_of(model: nn.Module, device_type: str, where: str) -> str | None:
    """Say in one clause why no step on a kind of device can stand for a model, or ``None``.

    Args:
        model: The model.
        device_type: Type of the device that its parameters must be on.
        where: That device in words.
    """
    if not isinstance(model, MambaLM):
        return f"the model is a {type(model).__name__}, not a MambaLM"
    for name, module in model.named_modules():
        if type(module) not in _KNOWN:
            return f"{name or 'the model'} is a {type(module).__name__}"
        if _is_changed(module):
            return f"{name or 'the model'} has hooks or a forward of its own"
        if isinstance(module, Mamba) and module.backend not in ("auto", "fused"):
            return f"the model names another backend, {module.backend!r}"
    for name, parameter in model.named_parameters():
        if parameter.device.type != device_type:
            return f"the model is on {parameter.device.type}, not on {where}"
        if type(parameter) is not nn.Parameter or parameter.layout != torch.strided:
            return f"{name} is a {type(parameter).__name__} of layout {parameter.layout}"
        if parameter.is_inference():
            return f"{name} was made in inference mode, where changes are not counted"
    dtypes = {model.lm_head.weight.dtype}
    dtypes |= {module.weight.dtype for module in model.modules() if isinstance(module, Linear)}
    if len(dtypes) > 1 or not dtypes <= _DTYPES:
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        return f"the model is in {names}, not in one of float32, bfloat16 and float16"
    return None


def _is_changed(module: nn.Module) -> bool:
    return "forward" in module.__dict__ or any(
        (
            module._forward_pre_hooks, module._forward_hooks,
            module._backward_pre_hooks, module._backward_hooks,
        )
    )  # fmt: skip


class Seen:
    """What a model consisted of when it was looked at, to tell whether that has changed.

    It looks before each token, so its loops are those of ``map``.
    """

    def __init__(self, model: MambaLM) -> None:
        places = [
            (members, name)
            for module in model.modules()
            for members in (module._modules, module._parameters)
            for name in members
        ]
        self._members, self._names = zip(*places, strict=True)
        self._values = self._look()
        self._parameters = list(model.parameters())
        self._versions, self._addresses = self._look_inside()

    def _look(self) -> list[Any]:
        return list(map(dict.get, self._members, self._names))

    def _look_inside(self) -> tuple[list[int], list[int]]:
        parameters = self._parameters
        return list(map(_version, parameters)), list(map(Tensor.data_ptr, parameters))

    def has_changed(self) -> bool:
        """Say whether a module or parameter was exchanged, or a parameter written to."""
        same = all(map(operator.is_, self._look(), self._values))
        return not same or self._look_inside() != (self._versions, self._addresses)

    def requires_grad(self) -> bool:
        """Say whether any parameter does."""
        return any(parameter.requires_grad for parameter in self._parameters)


# A prime: exchanges of rows or columns hardly ever move numbers by a multiple of it.
_PERIOD = 65521


def sum_of_bits(tensor: Tensor) -> Tensor:
    """Return a number that tells what is in a tensor, at the speed of memory.

    It changes with any one change of a number, and practically always with more: places count
    too, so that numbers which are exchanged are not taken for the same.
    """
    flat = tensor.detach().flatten()
    words = {8: torch.int64, 4: torch.int32, 2: torch.int16}
    fits = flat.storage_offset() * flat.itemsize | flat.nbytes
    flat = flat.view(next(dtype for size, dtype in words.items() if fits % size == 0))
    period = max(1, min(_PERIOD, len(flat)))
    whole = len(flat) // period * period
    sums = flat[:whole].view(-1, period).sum(0)
    sums[: len(flat) - whole] += flat[whole:]
    # by odd numbers, which no difference becomes 0 by
    return (sums * torch.arange(1, 2 * period, 2, device=flat.device)).sum()


def no_gradients(step: str) -> str:
    """Return the sentence for who asks a step for gradients."""
    return (
        f"{step}: it passes no gradients on: call it in torch.inference_mode() or "
        "torch.no_grad()"
    )


def check_tokens(step: str, tokens: Tensor, device: torch.device, shape: str = "(b,)") -> None:
    """Refuse what are no tokens of a batch on the step's device.

    ``shape`` is that of the tokens in words, an axis in each.

    Raises:
        ValueError: They are something else.
    """
    if not isinstance(tokens, Tensor):
        raise ValueError(f"{step}: tokens must be a tensor, got {type(tokens).__name__}")
    if tokens.ndim != len(shape.split()) or tokens.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"{step}: tokens must be int64 or int32 of shape {shape}, "
            f"got {str(tokens.dtype).removeprefix('torch.')} of shape {tuple(tokens.shape)}"
        )
    if tokens.device != device:
        raise ValueError(f"{step}: tokens must be on {device}, got {tokens.device}")


def check_state(
    step: str,
    state: ModelState,
    n_layer: int,
    conv: tuple[int, ...],
    ssm: tuple[int, ...],
    device: torch.device,
) -> None:
    """Refuse what is no state of the step's model.

    Raises:
        ValueError: It is something else, or of other sizes, or elsewhere.
        RuntimeError: A gradient is asked of it.
    """
    if not isinstance(state, ModelState):
        raise ValueError(
            f"{step}: state must be a ModelState or None, got {type(state).__name__}"
        )
    stacks = state.stacks
    if (
        stacks is not None
        and stacks.conv.shape == (n_layer, *conv)
        and stacks.ssm.shape == (n_layer, *ssm)
        and stacks.conv.device == stacks.ssm.device == device
        and not (
            torch.is_grad_enabled() and (stacks.conv.requires_grad or stacks.ssm.requires_grad)
        )
    ):
        return
    if len(state.layers) != n_layer:
        raise ValueError(
            f"{step}: state must have {n_layer} layers, got {len(state.layers)}: it is "
            "another model's"
        )
    for i, layer in enumerate(state.layers):
        for name, tensor, shape in (("conv", layer.conv, conv), ("ssm", layer.ssm, ssm)):
            if tensor.shape != shape:
                raise ValueError(
                    f"{step}: state must have {name} of {shape} in layer {i}, "
                    f"got {tuple(tensor.shape)}"
                )
            if tensor.device != device:
                raise ValueError(f"{step}: state must be on {device}, got {tensor.device}")
            if tensor.requires_grad and torch.is_grad_enabled():
                raise RuntimeError(no_gradients(step))
