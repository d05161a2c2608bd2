"""Tokens to hidden vectors: embedding, the stack of blocks, the last norm."""

import torch
from jaxtyping import Bool, Float, Int, Integer
from torch import Tensor, nn

from mambakit.modules import Block, Mamba, RMSNorm
from mambakit.modules._plain import is_plain
from mambakit.modules._residual import may_stay_open, normalise
from mambakit.ops._backends import Backend
from mambakit.ops._packing import Packing, arrange, bounds

from .config import MambaConfig
from .state import ModelState


def pack_tokens(
    tokens: Int[Tensor, "b l"],
    cu_seqlens: Int[Tensor, " bounds"] | None,
    lengths: Int[Tensor, " b"] | None,
    attention_mask: Bool[Tensor, "b l"] | Integer[Tensor, "b l"] | None,
) -> tuple[Int[Tensor, "rows steps"], Int[Tensor, " bounds"] | None, Packing | None]:
    """Check a model's tokens and what tells sequences apart, and leave out the padding.

    Returns:
        The tokens, as they are or as a pack; ``cu_seqlens`` of the pack, if it is one; and what
        brings its tokens back to padded rows, if they were.

    Raises:
        ValueError: As ``MambaLM`` says.
    """
    if not isinstance(tokens, Tensor):
        raise ValueError(f"MambaLM: tokens must be a tensor, got {type(tokens).__name__}")
    if tokens.ndim != 2 or tokens.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"MambaLM: tokens must be int64 or int32 of shape (b, l), "
            f"got {str(tokens.dtype).removeprefix('torch.')} of shape {tuple(tokens.shape)}"
        )
    b, l = tokens.shape
    cu_seqlens, packing = arrange(
        "MambaLM", b, l, tokens.device, cu_seqlens, lengths, attention_mask
    )
    if packing is not None:
        tokens = packing.pack(tokens)
    elif cu_seqlens is not None and not torch.compiler.is_compiling():
        bounds("MambaLM", cu_seqlens, l)
    return tokens, cu_seqlens, packing


def _last(
    x: Float[Tensor, "b l m"], cu_seqlens: Int[Tensor, " bounds"] | None
) -> Float[Tensor, "_ last m"]:
    """Return the last vector of each row (none of an empty one), or of each of a pack."""
    if cu_seqlens is None:
        return x[:, -1:]
    return x[0, cu_seqlens[1:].to(x.device) - 1, None]


class Backbone(nn.Module):
    """Turn tokens into one vector at each position, which has seen all tokens up to it.

    Args:
        config: Sizes and choices.
        backend: Implementation of the scans and convolutions, as in ``selective_scan``.
        device: Where the parameters are made.
        dtype: Dtype of the parameters; ``None`` means torch's default. Each mixer's ``A_log``,
            ``D`` and the bias of its ``dt_proj`` have at least float32.

    The embedding is drawn from a normal distribution of deviation 0.02, each mixer's
    ``out_proj`` is divided by ``sqrt(n_layer)``, and the rest is drawn as ``Mamba`` says.

    Source: Gu and Dao, "Mamba", 2023, section 3.4, and the authors' code.

    Example:
        >>> from mambakit import MambaConfig
        >>> backbone = Backbone(MambaConfig(d_model=16, n_layer=2, vocab_size=32))
        >>> x, state = backbone(torch.arange(5)[None])
        >>> x.shape
        torch.Size([1, 5, 16])
    """

    def __init__(
        self,
        config: MambaConfig,
        *,
        backend: Backend = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        m = config.d_model
        self.embedding = nn.Embedding(config.padded_vocab_size, m, device=device, dtype=dtype)
        self.layers = nn.ModuleList(
            self._draw_block(backend, device, dtype) for _ in range(config.n_layer)
        )
        self.norm_f = RMSNorm(m, config.norm_eps, device=device, dtype=dtype)
        nn.init.normal_(self.embedding.weight, std=0.02)

    def _draw_block(
        self,
        backend: Backend,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> Block:
        config = self.config
        mixer = Mamba(
            config.d_model,
            config.d_state,
            config.d_conv,
            config.expand,
            config.dt_rank,
            bias=config.bias,
            conv_bias=config.conv_bias,
            selection_norm_eps=config.selection_norm_eps,
            dt_min=config.dt_min,
            dt_max=config.dt_max,
            dt_init_floor=config.dt_init_floor,
            backend=backend,
            device=device,
            dtype=dtype,
        )
        with torch.no_grad():
            # n_layer branches are added up: this keeps the variance of their sum from growing.
            mixer.out_proj.weight.div_(config.n_layer**0.5)
        return Block(
            mixer, config.d_model, norm_eps=config.norm_eps, device=device, dtype=dtype
        )

    def forward(
        self,
        tokens: Int[Tensor, "b l"],
        state: ModelState | None = None,
        *,
        cu_seqlens: Int[Tensor, " bounds"] | None = None,
        lengths: Int[Tensor, " b"] | None = None,
        attention_mask: Bool[Tensor, "b l"] | Integer[Tensor, "b l"] | None = None,
        last_only: bool = False,
    ) -> tuple[Float[Tensor, "rows steps m"], ModelState]:
        """Return the normalised vectors and the state after the last token.

        ``state=None`` begins a sequence. ``cu_seqlens``, ``lengths`` and ``attention_mask``
        tell sequences apart as in ``MambaLM``; vectors of padding are 0. With ``last_only`` the
        vector of the last position alone comes back, with ``l = 1``: of each row, or of each
        sequence of a pack.

        Raises:
            ValueError: ``tokens`` are not whole numbers of shape ``(b, l)`` where the
                parameters are, ``state`` is of a model of other sizes or of another number of
                sequences or elsewhere, or the keyword that tells sequences apart does not fit
                ``tokens``.
        """
        tokens, cu_seqlens, packing = pack_tokens(tokens, cu_seqlens, lengths, attention_mask)
        embedding = self.embedding
        if is_plain(embedding, nn.Embedding) and tokens.device != embedding.weight.device:
            raise ValueError(
                f"MambaLM: tokens must be on {embedding.weight.device} like the parameters, "
                f"got {tokens.device}"
            )
        if state is not None:
            self._check_state(state, tokens, cu_seqlens)

        x = embedding(tokens)
        if self.config.residual_in_fp32:
            x = x.to(torch.promote_types(x.dtype, torch.float32))
        y, after = None, []  # the stream is x + y: each sum is left to the norm that reads it
        for i, block in enumerate(self.layers):
            before = None if state is None else state.layers[i]
            if may_stay_open(block):
                x, y = normalise(block.norm, x, y)
                y, layer = block.mixer(y, before, cu_seqlens=cu_seqlens)
            else:
                x, y = (x if y is None else x + y), None
                x, layer = block(x, before, cu_seqlens=cu_seqlens)
            after.append(layer)
        if last_only:
            x, y = _last(x, cu_seqlens), None if y is None else _last(y, cu_seqlens)
        _, x = normalise(self.norm_f, x, y)
        if packing is not None and not last_only:
            x = packing.unpack(x)
        return x, ModelState(tuple(after))

    def _check_state(
        self, state: ModelState, tokens: Tensor, cu_seqlens: Tensor | None
    ) -> None:
        config = self.config
        rows = tokens.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        if not isinstance(state, ModelState):
            raise ValueError(
                f"MambaLM: state must be a ModelState or None, got {type(state).__name__}"
            )
        if len(state.layers) != config.n_layer:
            raise ValueError(
                f"MambaLM: state must have {config.n_layer} layers, got {len(state.layers)}: "
                "it is another model's"
            )
        for i, layer in enumerate(state.layers):
            for name, tensor, size in (
                ("conv", layer.conv, config.d_conv - 1),
                ("ssm", layer.ssm, config.d_state),
            ):
                shape = tensor.shape
                if shape[1:] != (config.d_inner, size):
                    raise ValueError(
                        f"MambaLM: state must have {name} of (b, {config.d_inner}, {size}) in "
                        f"layer {i}, got {tuple(shape)}: it is another model's"
                    )
                if shape[0] != rows:
                    what = "tokens" if cu_seqlens is None else "the pack"
                    raise ValueError(
                        f"MambaLM: state must hold as many sequences as {what}, {rows}, "
                        f"got {shape[0]}"
                    )
