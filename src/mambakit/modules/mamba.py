"""The Mamba block's mixer: a gated selective scan behind a short causal convolution."""

import copy
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Integer
from torch import Tensor, nn

from mambakit.ops import causal_conv1d, selective_scan
from mambakit.ops._backends import Backend, resolve

from ._checks import check_input, check_part, check_positive, check_size, check_stream
from ._parameters import at_least_float32, exempt_from_decay
from ._plain import is_plain
from ._recompute import mix
from ._sequences import to_pack
from .linear import Linear, linear


class MixerState(NamedTuple):
    """All that a mixer remembers of a sequence, of a size that does not grow with it.

    ``conv`` holds the last ``w - 1`` inputs of the convolution, oldest first; ``ssm`` holds the
    state of the scan, in at least float32.
    """

    conv: Float[Tensor, "b d w-1"]
    ssm: Float[Tensor, "b d n"]

    def rows(self, index: slice | Tensor) -> "MixerState":
        """Return the state of some sequences of the batch."""
        return type(self)(self.conv[index], self.ssm[index])

    def detach(self) -> "MixerState":
        """Return the same numbers, cut off from the graph that computed them."""
        return type(self)(self.conv.detach(), self.ssm.detach())

    def to(
        self,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> "MixerState":
        """Move the state; ``dtype`` is that of ``conv``, and ``ssm`` keeps at least float32.

        What forks share, they share there too.
        """
        wide = None if dtype is None else torch.promote_types(dtype, torch.float32)
        return type(self)(
            _once(self.conv, lambda part: part.to(device=device, dtype=dtype)),
            _once(self.ssm, lambda part: part.to(device=device, dtype=wide)),
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> "MixerState":
        """Copy the numbers; where they have gradients, so has the copy."""
        # PyTorch copies only tensors that no operation made
        return type(self)(
            *(
                copy.deepcopy(part, memo) if part.is_leaf else _once(part, torch.clone)
                for part in self
            )
        )


def _once(part: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Change a tensor, and of rows that are one and the same the first alone."""
    if part.shape[0] > 1 and part.stride(0) == 0:
        return change(part[:1]).expand(part.shape)
    return change(part)


class StepProjection(Linear):
    """Expand the low-rank step to all channels, and leave the bias to the scan.

        dt_raw = weight dt_low,        dt = softplus(dt_raw + bias)     (in the scan)

    The scan adds ``bias`` in float32: in bfloat16 the sum would move each step by up to 1 %.
    A module that takes this one's place (an adapter around it, say) must do the same: return
    the product without the bias, and show the bias as its attribute ``bias``. ``bias`` stays
    in at least float32 when the module is converted to a shorter dtype.

    Example:
        >>> projection = StepProjection(3, 8)
        >>> dt_low = torch.randn(2, 5, 3)
        >>> torch.testing.assert_close(projection(dt_low), dt_low @ projection.weight.T)
    """

    def __init__(
        self,
        r: int,
        d: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(r, d, bias=True, device=device, dtype=dtype)
        self._apply(lambda tensor: tensor)
        exempt_from_decay(self.bias)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        exempt_from_decay(self.bias)  # a deep copy of a parameter loses its marks

    def forward(self, input: Float[Tensor, "*batch r"]) -> Float[Tensor, "*batch d"]:
        """Return ``weight input``."""
        return linear(input, self.weight)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "StepProjection":
        return super()._apply(at_least_float32(fn, (self.bias,)), recurse)


def _divide_by_rms(x: Float[Tensor, "*batch k"], eps: float) -> Float[Tensor, "*batch k"]:
    """Return each vector at root mean square 1, computed in at least float32."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return F.rms_norm(wide, wide.shape[-1:], eps=eps).to(x.dtype)


class Mamba(nn.Module):
    """Mix a sequence along time by a state space that selects what it keeps.

        x, z         = in_proj(u)                             d = expand m channels each
        x            = silu(conv1d(x))                        causal, depthwise, width w
        dt_low, B, C = x_proj(x)                              r, n and n numbers each step
        dt           = softplus(dt_proj(dt_low) + bias)
        h_t          = exp(dt_t A) h_{t-1} + dt_t B_t x_t     A = -exp(A_log)
        y            = out_proj((C_t . h_t + D x_t) * silu(z_t))

    Args:
        d_model: Width ``m`` of input and output.
        d_state: State size ``n`` of each channel, from 1 to 256.
        d_conv: Width ``w`` of the convolution, at least 1.
        expand: Inner channels for each channel of the model.
        dt_rank: Rank ``r`` of the step's projection; ``"auto"`` is ``ceil(d_model / 16)``.
        bias: Whether ``in_proj`` and ``out_proj`` have a bias.
        conv_bias: Whether the convolution has a bias.
        selection_norm_eps: ``eps`` of FalconMamba's norms: ``dt_low``, ``B`` and ``C`` are each
            divided by their root mean square, without a gain; ``None``: they are not.
        dt_min: Smallest step at initialisation.
        dt_max: Largest step at initialisation.
        dt_init_floor: Steps drawn below it are raised to it.
        backend: Implementation of the scan and the convolution, as in ``selective_scan``.
        device: Where the parameters are made.
        dtype: Dtype of the projections; ``None`` means torch's default. ``A_log``, ``D`` and
            the bias of ``dt_proj`` have at least float32, now and after every ``.to(dtype)``.

    The projections are called as modules, so adapters may be put around them (around
    ``dt_proj`` as ``StepProjection`` says); ``conv1d`` only holds the convolution's weights.
    ``A_log``, ``D`` and all biases carry the mark ``_no_weight_decay``.

    On a GPU the backward pass makes the convolution's output and the step again, which costs
    less than to keep them. That takes ``x_proj`` and ``dt_proj`` as they were made: one that is
    replaced or hooked is called as a module, and its results are kept.

    At first ``A_log = log(1..n)`` in each channel, ``D = 1``, ``dt_proj.weight`` is uniform
    within ``r**-0.5``, and its bias is such that the step is log-uniform in
    ``[dt_min, dt_max]`` where ``dt_raw = 0``. The other weights have PyTorch's own
    distributions, and biases of projections are zero.

    Raises:
        ValueError: A size is no whole number of at least 1, ``d_state`` exceeds 256,
            ``selection_norm_eps`` is not positive, or the steps are not
            ``0 < dt_min <= dt_max`` and ``0 < dt_init_floor``, all finite.

    Source: Gu and Dao, "Mamba", 2023, section 3.4 and algorithm 2; initialisation as in the
    authors' code, section 3.6 and appendix E. The norms: Zuo et al., "Falcon Mamba", 2024.

    Example:
        >>> mixer = Mamba(16)
        >>> u = torch.randn(2, 10, 16)
        >>> whole, end = mixer(u)
        >>> left, state = mixer(u[:, :6])
        >>> right, state = mixer(u[:, 6:], state)
        >>> torch.testing.assert_close(torch.cat([left, right], dim=1), whole)
        >>> torch.testing.assert_close(state.ssm, end.ssm)
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | Literal["auto"] = "auto",
        *,
        bias: bool = False,
        conv_bias: bool = True,
        selection_norm_eps: float | None = None,
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        dt_init_floor: float = 1e-4,
        backend: Backend = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = {"d_model": d_model, "d_state": d_state, "d_conv": d_conv, "expand": expand}
        for name, size in sizes.items():
            check_size("Mamba", name, size)
        if dt_rank != "auto":
            check_size("Mamba", "dt_rank", dt_rank)
        if d_state > 256:
            raise ValueError(f"Mamba: d_state must be at most 256, got {d_state}")
        steps = {"dt_min": dt_min, "dt_max": dt_max, "dt_init_floor": dt_init_floor}
        for name, value in steps.items():
            check_positive("Mamba", name, value)
        if dt_min > dt_max:
            raise ValueError(f"Mamba: dt_min must be at most dt_max={dt_max}, got {dt_min}")
        if selection_norm_eps is not None:
            check_positive("Mamba", "selection_norm_eps", selection_norm_eps)

        d = expand * d_model
        rank = math.ceil(d_model / 16) if dt_rank == "auto" else dt_rank
        self.d_model, self.d_inner = d_model, d
        self.d_state, self.d_conv = d_state, d_conv
        self.dt_rank = rank
        self.selection_norm_eps = selection_norm_eps
        self.backend: Backend = backend
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        wide = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)

        self.in_proj = Linear(d_model, 2 * d, bias=bias, **where)
        self.conv1d = nn.Conv1d(d, d, d_conv, groups=d, bias=conv_bias, **where)
        self.x_proj = Linear(d, rank + 2 * d_state, bias=False, **where)
        self.dt_proj = StepProjection(rank, d, **where)
        self.A_log = nn.Parameter(torch.empty(d, d_state, device=device, dtype=wide))
        self.D = nn.Parameter(torch.empty(d, device=device, dtype=wide))
        self.out_proj = Linear(d, d_model, bias=bias, **where)
        self._exempt_from_decay()
        self._draw_parameters(dt_min, dt_max, dt_init_floor)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._exempt_from_decay()  # a deep copy of a parameter loses its marks

    def _exempt_from_decay(self) -> None:
        # an adapter in the place of a projection may have no bias
        layers = (self.in_proj, self.conv1d, self.out_proj)
        exempt_from_decay(
            self.A_log, self.D, *(getattr(layer, "bias", None) for layer in layers)
        )

    @torch.no_grad()
    def _draw_parameters(self, dt_min: float, dt_max: float, dt_init_floor: float) -> None:
        """Draw what PyTorch's own initialisation of the layers does not give as published."""
        for projection in (self.in_proj, self.out_proj):
            if projection.bias is not None:
                nn.init.zeros_(projection.bias)

        bound = self.dt_rank**-0.5
        nn.init.uniform_(self.dt_proj.weight, -bound, bound)
        bias = self.dt_proj.bias
        log_dt = torch.empty_like(bias).uniform_(math.log(dt_min), math.log(dt_max))
        dt = log_dt.exp().clamp(min=dt_init_floor)
        # The inverse of softplus, log(exp(dt) - 1), without the cancellation at small dt.
        bias.copy_(dt + torch.log(-torch.expm1(-dt)))

        n = self.A_log.shape[1]
        self.A_log.copy_(torch.arange(1, n + 1, device=self.A_log.device).log())
        nn.init.ones_(self.D)

    def forward(
        self,
        x: Float[Tensor, "b l m"],
        state: MixerState | None = None,
        *,
        cu_seqlens: Int[Tensor, " bounds"] | None = None,
        lengths: Int[Tensor, " b"] | None = None,
        attention_mask: Bool[Tensor, "b l"] | Integer[Tensor, "b l"] | None = None,
    ) -> tuple[Float[Tensor, "b l m"], MixerState]:
        """Mix ``x`` along time, going on from ``state``, and return the state after it too.

        ``state=None`` begins a sequence. Gradients flow through both states. Sequences of
        several lengths share a call, each as if it were alone, by one of the keywords
        ``cu_seqlens``, ``lengths`` and ``attention_mask``, which mean what they mean to
        ``selective_scan``: states are then those of the sequences, and ``y`` is 0 at padding.

        Raises:
            ValueError: ``x`` or ``state`` has other sizes than the module or than each other,
                lies elsewhere or is no tensor of floats, or ``x`` has another dtype than the
                projections where ``torch.autocast`` converts neither; or the keyword that tells
                sequences apart does not fit ``x``.
            RuntimeError: The backend that was named cannot run on the device of ``x``.
        """
        in_proj = self.in_proj
        check_input("Mamba", x, self.d_model, in_proj, Linear)
        x, cu_seqlens, packing = to_pack("Mamba", x, cu_seqlens, lengths, attention_mask)
        conv, ssm = None, None
        if state is not None:
            if type(state) is tuple and len(state) == 2:  # what a hook may make of one
                state = MixerState(*state)
            self._check_state(state, x, cu_seqlens)
            conv, ssm = state
        xz = in_proj(x)
        mixing = self._mix_lean if self._recomputes(xz.device) else self._mix
        y, conv, ssm = mixing(xz, conv, ssm, cu_seqlens)
        y = self.out_proj(y)
        return (y if packing is None else packing.unpack(y)), MixerState(conv, ssm)

    def _check_state(self, state: object, x: Tensor, cu_seqlens: Tensor | None) -> None:
        """Check that ``state`` holds what came before each sequence of ``x``."""
        if not isinstance(state, MixerState):
            raise ValueError(
                f"Mamba: state must be a MixerState or None, got {type(state).__name__}"
            )
        rows = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        d = self.d_inner
        check_part("Mamba", "conv", state.conv, (rows, d, self.d_conv - 1), x)
        check_part("Mamba", "ssm", state.ssm, (rows, d, self.d_state), x)

    def _mix(
        self, xz: Tensor, conv: Tensor | None, ssm: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        u, z = xz.chunk(2, dim=-1)
        u, conv = causal_conv1d(
            u,
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            activation="silu",
            state=conv,
            cu_seqlens=cu_seqlens,
            backend=self.backend,
        )
        n = self.d_state
        dt_low, B, C = self.x_proj(u).split((self.dt_rank, n, n), dim=-1)
        if self.selection_norm_eps is not None:
            dt_low, B, C = (_divide_by_rms(v, self.selection_norm_eps) for v in (dt_low, B, C))
        y, ssm = selective_scan(
            u,
            self.dt_proj(dt_low),
            -torch.exp(self.A_log),
            B,
            C,
            self.D,
            gate=z,
            dt_bias=self.dt_proj.bias,
            dt_softplus=True,
            state=ssm,
            cu_seqlens=cu_seqlens,
            backend=self.backend,
        )
        return y, conv, ssm

    def _recomputes(self, device: torch.device) -> bool:
        """Say whether the backward pass is better made to recompute, as ``_recompute`` does.

        Only where arithmetic is cheap beside memory, and where the two projections between
        are this module's own, so that their weights are all there is to them.
        """
        return (
            device.type == "cuda"
            and torch.is_grad_enabled()
            and self.selection_norm_eps is None
            and is_plain(self.x_proj, Linear)
            and is_plain(self.dt_proj, StepProjection)
            and resolve("Mamba", self.backend, device) == "fused"
        )

    def _mix_lean(
        self, xz: Tensor, conv: Tensor | None, ssm: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        # an adapter's output is as unknown here as what comes from outside
        check_stream("Mamba", "the output of in_proj", xz, 2 * self.d_inner)
        return mix(
            xz,
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            self.x_proj.weight.to(xz.dtype),
            self.dt_proj.weight.to(xz.dtype),
            -torch.exp(self.A_log),
            self.D,
            self.dt_proj.bias,
            conv,
            ssm,
            cu_seqlens,
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Mamba":
        return super()._apply(at_least_float32(fn, (self.A_log, self.D)), recurse)
