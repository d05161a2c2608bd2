"""What ``causal_conv1d`` and its step mean, what they accept, and what runs them."""

from typing import Literal, NamedTuple

from jaxtyping import Bool, Float, Int, Integer
from torch import Tensor

from .._backends import Backend, resolve
from .._packing import arrange
from .._shapes import check_axes, check_floats
from . import fused, parallel, reference

Activation = Literal["silu"] | None

_RUN = {"reference": reference.conv, "parallel": parallel.conv, "fused": fused.conv}


class ConvOutput(NamedTuple):
    """What a convolution gives back: the output, and the state to continue from.

    ``y`` is (b, l, d) from ``causal_conv1d`` and (b, d) from ``causal_conv1d_step``. ``state``
    is (s, d, w - 1): one for each sequence, which are the ``b`` rows of the batch where they
    are not those of a pack. Both have the dtype of ``x``.
    """

    y: Float[Tensor, "b *l d"]
    state: Float[Tensor, "s d w-1"]


def causal_conv1d(
    x: Float[Tensor, "b l d"],
    weight: Float[Tensor, "d w"],
    bias: Float[Tensor, " d"] | None = None,
    *,
    activation: Activation = None,
    state: Float[Tensor, "b d w-1"] | Float[Tensor, "s d w-1"] | None = None,
    cu_seqlens: Int[Tensor, " bounds"] | None = None,
    lengths: Int[Tensor, " b"] | None = None,
    attention_mask: Bool[Tensor, "b l"] | Integer[Tensor, "b l"] | None = None,
    backend: Backend = "auto",
) -> ConvOutput:
    """Filter each channel with a short window that ends at the present step.

        y_t = act(bias + sum_k weight[:, k] x_{t-w+1+k}),        k = 0 .. w-1

    The layout is channels-last. Any strides are accepted; slices of a wider tensor along
    its last axis are not copied. Gradients flow to every tensor, from ``y`` and from the
    state, and the backward pass is deterministic and the same for any number of threads. It
    keeps the inputs only. Values are not inspected: a NaN reaches the ``w`` steps from its own
    on, in its own sequence and channel, and nothing else.

    Sequences of several lengths share a call as they do in ``selective_scan``: laid end to end
    in a batch of 1, with ``cu_seqlens``, or padded, with ``lengths`` or ``attention_mask``. At
    most one of the three may be given.

    Args:
        x: Input signal, float32, bfloat16, float16 or float64. Any length, also 0.
        weight: One filter for each channel, of any width ``w`` from 1 up. The last tap,
            ``weight[:, -1]``, meets the present input. Any of the four dtypes.
        bias: Added before the activation. ``None`` means nothing is added.
        activation: ``"silu"`` is v sigmoid(v). ``None`` is the identity.
        state: The ``w - 1`` inputs before the first step of each sequence, oldest first.
            ``None`` means zeros. It is rounded to the dtype of ``x``.
        cu_seqlens: Where each of the ``s`` sequences of a pack begins, and ``l``: s + 1 numbers
            that rise from 0, int32 or int64. ``b`` is then 1, and ``state`` is (s, d, w - 1).
            Best on the CPU, where it is also no obstacle to a compiler: from another device it
            is fetched, for which the processor waits. ``None`` means that each row of the batch
            is one sequence.
        lengths: How many steps at the beginning of each row are its sequence, from 1 to ``l``;
            what follows is padding. It is read by the processor, as ``cu_seqlens`` is.
        attention_mask: 1 or ``True`` where a token is and 0 at the padding, which may lie on
            the left, on the right or on both sides: the ones of a row are one run. Read by the
            processor too. Whatever lies at padding reaches nothing: there ``y`` is 0, and so is
            the gradient of ``x``.
        backend: ``"reference"`` is PyTorch alone, on any device, the definition.
            ``"parallel"`` is the same, for the definition is parallel in time, but takes all
            sequences of a pack at once. ``"fused"`` is the kernel for the device of ``x``, and
            raises if there is none. ``"auto"`` is ``"fused"`` where the device has it, else
            ``"parallel"``.

    Returns:
        ``y``, and the ``state`` after the last step of each sequence: its last ``w - 1``
        inputs, of ``state`` and ``x`` together. Both in the dtype of ``x``. Feed the state to
        the next call to continue the sequence: the cut may fall anywhere and does not change
        the result. The state's channels are neighbours in memory, so it is a transposed tensor.
        All arithmetic is in float32, or float64 if ``x`` is float64, and under
        ``torch.autocast`` too.

    Raises:
        ValueError: A shape, dtype, device or layout is wrong, or the name of the activation
            or the backend, or the values of ``cu_seqlens``, ``lengths`` or
            ``attention_mask`` are.
        RuntimeError: ``backend="fused"`` cannot run on this device or in this installation,
            or a second or forward-mode derivative, or one by ``torch.func``, is asked of it.

    Source:
        Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces",
        section 3.4: the convolution before the selective scan, w = 4.

    Example:
        A sequence may be cut anywhere and continued from the state:

        >>> import torch
        >>> from mambakit.ops import causal_conv1d
        >>> x, weight, bias = torch.randn(2, 10, 8), torch.randn(8, 4), torch.randn(8)
        >>> whole = causal_conv1d(x, weight, bias, activation="silu")
        >>> left = causal_conv1d(x[:, :7], weight, bias, activation="silu")
        >>> right = causal_conv1d(
        ...     x[:, 7:], weight, bias, activation="silu", state=left.state
        ... )
        >>> torch.testing.assert_close(torch.cat([left.y, right.y], dim=1), whole.y)
        >>> torch.testing.assert_close(right.state, x[:, -3:].mT)

        Sequences laid end to end stay apart, each as if it were alone:

        >>> x, cu_seqlens = x[:1], torch.tensor([0, 7, 10])
        >>> packed = causal_conv1d(x, weight, bias, cu_seqlens=cu_seqlens)
        >>> alone = causal_conv1d(x[:, 7:], weight, bias)
        >>> torch.testing.assert_close(packed.y[:, 7:], alone.y)
        >>> torch.testing.assert_close(packed.state[1:], alone.state)
    """
    check_floats("causal_conv1d", "x", "weight", x=x, weight=weight, bias=bias, state=state)
    sizes = check_axes(
        "causal_conv1d", x=(x, "b l d"), weight=(weight, "d w"), bias=(bias, "d")
    )
    cu_seqlens, packing = arrange(
        "causal_conv1d", sizes["b"], sizes["l"], x.device, cu_seqlens, lengths, attention_mask
    )
    if cu_seqlens is not None:
        sizes["s"] = cu_seqlens.shape[0] - 1
    _check_values("causal_conv1d", sizes, state, activation)
    run = _RUN[resolve("causal_conv1d", backend, x.device)]
    if packing is not None:
        x = packing.pack(x)
    y, last = run(x, weight, bias, state, activation == "silu", cu_seqlens)
    return ConvOutput(y if packing is None else packing.unpack(y), last)


def causal_conv1d_step(
    x: Float[Tensor, "b d"],
    weight: Float[Tensor, "d w"],
    bias: Float[Tensor, " d"] | None = None,
    *,
    activation: Activation = None,
    state: Float[Tensor, "b d w-1"] | None = None,
    backend: Backend = "auto",
) -> ConvOutput:
    """Advance the window of ``causal_conv1d`` by one step: its law at l = 1.

        y = act(bias + weight[:, w-1] x + sum_k weight[:, k] state[:, k]),      k = 0 .. w-2

    Args:
        x: Input at this step, one vector for each sequence.
        weight: One filter for each channel, as in ``causal_conv1d``; so are all that follow.
        bias: Added before the activation. ``None`` means nothing is added.
        activation: ``"silu"`` is v sigmoid(v). ``None`` is the identity.
        state: The ``w - 1`` inputs before this step, oldest first. ``None`` means zeros. It
            is not changed.
        backend: As in ``causal_conv1d``.

    Returns:
        ``y`` (b, d), and the new ``state``: the old one without its oldest input and with
        ``x`` at its end. Both in the dtype of ``x``.

    Raises:
        ValueError: A shape, dtype, device or layout is wrong, or the name of the activation
            or the backend.
        RuntimeError: ``backend="fused"`` cannot run on this device or in this installation,
            or a second or forward-mode derivative, or one by ``torch.func``, is asked of it.

    Source:
        As ``causal_conv1d``.

    Example:
        Stepping through a sequence is the convolution:

        >>> import torch
        >>> from mambakit.ops import causal_conv1d, causal_conv1d_step
        >>> x, weight, state = torch.randn(2, 5, 8), torch.randn(8, 4), None
        >>> for t in range(5):
        ...     y, state = causal_conv1d_step(x[:, t], weight, state=state)
        >>> whole = causal_conv1d(x, weight)
        >>> torch.testing.assert_close(y, whole.y[:, -1])
        >>> torch.testing.assert_close(state, whole.state)
    """
    check_floats(
        "causal_conv1d_step", "x", "weight", x=x, weight=weight, bias=bias, state=state
    )
    sizes = check_axes(
        "causal_conv1d_step", x=(x, "b d"), weight=(weight, "d w"), bias=(bias, "d")
    )
    _check_values("causal_conv1d_step", sizes, state, activation)
    run = _RUN[resolve("causal_conv1d_step", backend, x.device)]
    y, last = run(x[:, None], weight, bias, state, activation == "silu")
    return ConvOutput(y[:, 0], last)


def _check_values(
    operation: str, sizes: dict[str, int], state: Tensor | None, activation: Activation
) -> None:
    rows = "s" if "s" in sizes else "b"
    d, w = sizes["d"], sizes["w"]
    if d < 1:
        raise ValueError(f"{operation}: x must have at least one channel, got 0")
    if w < 1:
        raise ValueError(f"{operation}: weight must have at least one tap, got 0")
    if state is not None and state.shape != (sizes[rows], d, w - 1):
        raise ValueError(
            f"{operation}: state must have shape ({rows}={sizes[rows]}, d={d}, w-1={w - 1}), "
            f"got {tuple(state.shape)}"
        )
    if activation is not None and activation != "silu":
        raise ValueError(f"{operation}: activation must be 'silu' or None, got {activation!r}")
