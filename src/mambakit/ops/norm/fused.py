"""RMSNorm in one pass as registered operators: schema, fake, kernels.

They have no gradient: PyTorch's own, or a compiler, serves who asks for one. They are private
to the package and check nothing that ``serves`` has not.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from .. import _backends
from .._autograd import any_requires_grad, refuse_tangents
from . import cuda

torch.library.define("mambakit::rms_norm", "(Tensor x, Tensor gain, float eps) -> Tensor y")
torch.library.define(
    "mambakit::add_rms_norm",
    "(Tensor x, Tensor addend, Tensor gain, float eps) -> (Tensor sum, Tensor y)",
)

rms_norm = torch.ops.mambakit.rms_norm.default
add_rms_norm = torch.ops.mambakit.add_rms_norm.default


@torch.library.register_fake("mambakit::rms_norm")
def _(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    return gain.new_empty(x.shape)


@torch.library.register_fake("mambakit::add_rms_norm")
def _(x: Tensor, addend: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, addend.dtype)
    return x.new_empty(x.shape, dtype=dtype), gain.new_empty(x.shape)


torch.library.impl("mambakit::rms_norm", "CUDA", cuda.rms_norm)
torch.library.impl("mambakit::add_rms_norm", "CUDA", cuda.add_rms_norm)


def _implement_autograd(name: str, operator: Any) -> None:
    def refuse(*arguments: Any) -> Any:
        refuse_tangents("RMSNorm", arguments)
        if torch.is_grad_enabled() and any_requires_grad(arguments):
            raise RuntimeError("RMSNorm: its operator in one pass has no gradient")
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*arguments)

    torch.library.impl(name, "Autograd", refuse)


_implement_autograd("mambakit::rms_norm", rms_norm)
_implement_autograd("mambakit::add_rms_norm", add_rms_norm)


def serves(x: Tensor, gain: Tensor, addend: Tensor | None = None) -> bool:
    """Say whether the operators take these tensors, and better than PyTorch does.

    They do on an NVIDIA GPU where its kernels can be compiled, if nobody asks for a derivative
    and nothing is being compiled around them: a compiler fuses the expressions itself.
    """
    # what is asked first is what most calls fail by, or what costs least
    return (
        x.is_cuda
        and not torch.compiler.is_compiling()
        and not (torch.is_grad_enabled() and any_requires_grad((x, gain, addend)))
        and _fits(x, x)
        and _fits(gain, x)
        and gain.shape == x.shape[-1:]
        and (addend is None or (_fits(addend, x) and addend.shape == x.shape))
        and forward_ad._current_level < 0
        and not torch._C._are_functorch_transforms_active()
        and _backends.why_not_fused("RMSNorm", x.device) is None
    )


def _fits(t: Tensor, x: Tensor) -> bool:
    kind = type(t)  # other classes have ways of their own with what PyTorch has
    return (
        (kind is Tensor or kind is nn.Parameter)
        and t.dtype in cuda.DTYPES
        and t.get_device() == x.get_device()
    )
