"""The mixer between its outer projections, as one operator that recomputes what is cheap.

    x, z         = xz
    u            = silu(conv(x))
    dt_low, B, C = x_proj u
    dt           = softplus(dt_proj dt_low + dt_bias)
    y            = scan(u, dt, A, B, C, D, gate=z)

Autograd by itself would keep ``u`` and ``dt``, each half as large as ``xz``, for the backward
pass. On a GPU it costs less to make them again than room to keep them: the convolution reads
``x`` once, and the step is a product of small rank. What stays is ``xz``, the r + 2n numbers a
step that ``x_proj`` gives, and the scan's checkpoints. One operator for all of it rather than a
checkpointed region, because a compiler takes it as it is: in a traced graph the second
convolution would be found equal to the first and be merged with it, and ``u`` kept after all.

The operator is private and checks nothing: ``Mamba`` hands it what the operations have checked
in other calls, or what its own parameters make right.
"""

from typing import Any

import torch
from torch import Tensor

from mambakit.ops._autograd import any_requires_grad, refuse_tangents, refuse_transforms
from mambakit.ops._packing import kept_for_backward
from mambakit.ops.scan.fused import checkpoint_steps, steps_to_save

_INPUTS = (
    "Tensor xz, Tensor conv_weight, Tensor? conv_bias, Tensor x_proj, Tensor dt_proj, "
    "Tensor A, Tensor D, Tensor dt_bias, Tensor? conv_state, Tensor? ssm_state, "
    "Tensor? cu_seqlens"
)
_GRADIENTS = (
    "Tensor dxz, Tensor dconv_weight, Tensor dconv_bias, Tensor dx_proj, Tensor ddt_proj, "
    "Tensor dA, Tensor dD, Tensor ddt_bias, Tensor dconv_state, Tensor dssm_state"
)
_FORWARD, _BACKWARD = "mambakit::mix", "mambakit::mix_backward"

torch.library.define(
    _FORWARD,
    f"({_INPUTS}, int checkpoint_steps, bool save) -> "
    "(Tensor y, Tensor conv_last, Tensor ssm_last, Tensor projected, Tensor checkpoints)",
)
torch.library.define(
    _BACKWARD,
    f"(Tensor dy, Tensor? dconv_last, Tensor? dssm_last, {_INPUTS}, Tensor projected, "
    f"Tensor checkpoints) -> ({_GRADIENTS})",
)


def _product(x: Tensor, weight: Tensor) -> Tensor:
    return (x.flatten(0, 1) @ weight.T).unflatten(0, x.shape[:2])


def _forward(
    xz: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    x_proj: Tensor,
    dt_proj: Tensor,
    A: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    conv_state: Tensor | None,
    ssm_state: Tensor | None,
    cu_seqlens: Tensor | None,
    steps: int,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    n = A.shape[1]
    x, z = xz.chunk(2, dim=-1)
    u, conv_last = torch.ops.mambakit.causal_conv1d(
        x, conv_weight, conv_bias, conv_state, cu_seqlens, True
    )
    projected = _product(u, x_proj)
    dt_low, B, C = projected.split((dt_proj.shape[1], n, n), dim=-1)
    dt = _product(dt_low, dt_proj)
    y, ssm_last, checkpoints = torch.ops.mambakit.selective_scan(
        u, dt, A, B, C, D, z, dt_bias, ssm_state, cu_seqlens, True, steps, save
    )
    return y, conv_last, ssm_last, projected, checkpoints


def _backward(
    dy: Tensor,
    dconv_last: Tensor | None,
    dssm_last: Tensor | None,
    xz: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    x_proj: Tensor,
    dt_proj: Tensor,
    A: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    conv_state: Tensor | None,
    ssm_state: Tensor | None,
    cu_seqlens: Tensor | None,
    projected: Tensor,
    checkpoints: Tensor,
) -> tuple[Tensor, ...]:
    r, n = dt_proj.shape[1], A.shape[1]
    x, z = xz.chunk(2, dim=-1)
    dt_low, B, C = projected.split((r, n, n), dim=-1)
    u, _ = torch.ops.mambakit.causal_conv1d(
        x, conv_weight, conv_bias, conv_state, cu_seqlens, True
    )
    dxz = torch.empty_like(xz, memory_format=torch.contiguous_format)
    dx, dz = dxz.chunk(2, dim=-1)
    du, ddt, dA, dB, dC, dD, ddt_bias, dssm_state = (
        torch.ops.mambakit.selective_scan_backward.into(
            dy, dssm_last, u, _product(dt_low, dt_proj), A, B, C, D, z, dt_bias, ssm_state,
            cu_seqlens, checkpoints, True, dgate=dz,
        )
    )  # fmt: skip
    ddt = ddt.flatten(0, 1)
    ddt_proj = ddt.T @ dt_low.flatten(0, 1)
    dprojected = torch.cat([(ddt @ dt_proj).view_as(dt_low), dB, dC], dim=-1).flatten(0, 1)
    del ddt
    dx_proj = dprojected.T @ u.flatten(0, 1)
    du.flatten(0, 1).addmm_(dprojected, x_proj)
    del u
    dconv_weight, dconv_bias, dconv_state = torch.ops.mambakit.causal_conv1d_backward.into(
        du, dconv_last, x, conv_weight, conv_bias, conv_state, cu_seqlens, True, dx=dx
    )
    return (
        dxz, dconv_weight, dconv_bias, dx_proj, ddt_proj, dA, dD, ddt_bias, dconv_state,
        dssm_state,
    )  # fmt: skip


for _name, _kernel in ((_FORWARD, _forward), (_BACKWARD, _backward)):
    torch.library.impl(_name, "CompositeExplicitAutograd", _kernel)
    # the operators that it is made of have fake kernels, so it is its own
    torch.library.register_fake(_name, _kernel)


class _Gradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        *inputs, cu_seqlens = arguments
        inputs.append(kept_for_backward(cu_seqlens))
        xz, A = inputs[0], inputs[5]
        steps = steps_to_save(xz, (*xz.shape[:2], *A.shape), cu_seqlens is not None)
        with torch._C._AutoDispatchBelowAutograd():
            outputs = torch.ops.mambakit.mix(*inputs, steps, True)
        *_, projected, checkpoints = outputs
        ctx.save_for_backward(*inputs, projected, checkpoints)
        ctx.mark_non_differentiable(projected, checkpoints)
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    def backward(
        ctx: Any,
        dy: Tensor | None,
        dconv_last: Tensor | None,
        dssm_last: Tensor | None,
        *_: None,
    ) -> tuple[Tensor | None, ...]:
        *inputs, projected, checkpoints = ctx.saved_tensors
        if dy is None:
            xz = inputs[0]
            dy = xz.new_zeros((*xz.shape[:2], xz.shape[2] // 2))
        gradients = torch.ops.mambakit.mix_backward(
            dy, dconv_last, dssm_last, *inputs, projected, checkpoints
        )
        *differentiable, _ = inputs
        return *(
            None if t is None else g for t, g in zip(differentiable, gradients, strict=True)
        ), None


@torch.library.impl(_FORWARD, "Autograd")
def _(*arguments: Any) -> tuple[Tensor, ...]:
    refuse_tangents("Mamba", arguments)
    *inputs, _, _ = arguments
    if torch.is_grad_enabled() and any_requires_grad(inputs):
        refuse_transforms("Mamba")
        return _Gradient.apply(*inputs)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.mambakit.mix(*arguments)


@torch.library.impl(_BACKWARD, "Autograd")
def _(*arguments: Any) -> tuple[Tensor, ...]:
    refuse_tangents("Mamba", arguments)
    if torch.is_grad_enabled() and any_requires_grad(arguments):
        raise RuntimeError("Mamba: second derivatives exist only with backend='reference'")
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.mambakit.mix_backward(*arguments)


def mix(
    xz: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    x_proj: Tensor,
    dt_proj: Tensor,
    A: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    conv_state: Tensor | None,
    ssm_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``y`` (b, l, d) and the states after the last step, as the module's page says.

    ``xz`` is (b, l, 2 d) and ``conv_weight`` (d, w); ``x_proj`` (r + 2 n, d) and ``dt_proj``
    (d, r) have the dtype of ``xz``. The rest is as in ``causal_conv1d`` and ``selective_scan``.
    """
    y, conv_last, ssm_last, _, _ = torch.ops.mambakit.mix(
        xz, conv_weight, conv_bias, x_proj, dt_proj, A, D, dt_bias, conv_state, ssm_state,
        cu_seqlens, checkpoint_steps(xz.device), False,
    )  # fmt: skip
    return y, conv_last, ssm_last
