"""The language model: a backbone and a layer that scores the next token."""

import os
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Integer
from torch import Tensor, nn

from mambakit.modules import Linear
from mambakit.ops._backends import Backend

from .backbone import Backbone, pack_tokens
from .config import MambaConfig
from .state import ModelState


class LMOutput(NamedTuple):
    """What a language model returns: the next token's ``logits``, and the ``state``."""

    logits: Float[Tensor, "b l v"]
    state: ModelState


class MambaLM(nn.Module):
    """Score every possible next token after each token of a sequence.

        logits = lm_head(backbone(tokens)),        P(token_{t+1}) = softmax(logits_t)

    Args:
        config: Sizes and choices.
        backend: Implementation of the scans and convolutions: ``"auto"`` takes the fastest of
            the device; see ``mambakit.ops.selective_scan``.
        device: Where the parameters are made; ``"meta"`` makes none, to count or to load.
        dtype: Dtype of the parameters; ``None`` means torch's default. Each mixer's ``A_log``,
            ``D`` and the bias of its ``dt_proj`` have at least float32, now and after every
            ``.to(dtype)``, and so has the scans' arithmetic.

    Parameters are named as in the authors' checkpoints, and drawn as ``Backbone`` says; an
    ``lm_head`` of its own has PyTorch's distribution. Those that weight decay must leave alone
    carry the attribute ``_no_weight_decay``.

    Source: Gu and Dao, "Mamba", 2023, section 3.4, and the authors' code.

    Example:
        >>> model = MambaLM(MambaConfig(d_model=16, n_layer=2, vocab_size=32))
        >>> tokens = torch.randint(32, (2, 12))
        >>> whole = model(tokens)
        >>> left = model(tokens[:, :5])
        >>> right = model(tokens[:, 5:], left.state)
        >>> torch.testing.assert_close(right.logits, whole.logits[:, 5:])
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
        self.backbone = Backbone(config, backend=backend, device=device, dtype=dtype)
        self.lm_head = Linear(
            config.d_model,
            config.padded_vocab_size,
            bias=False,
            device="meta" if config.tie_embeddings else device,
            dtype=dtype,
        )
        if config.tie_embeddings:
            self.lm_head.weight = self.backbone.embedding.weight

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.backbone.embedding.weight.device

    def forward(
        self,
        tokens: Int[Tensor, "b l"],
        state: ModelState | None = None,
        *,
        cu_seqlens: Int[Tensor, " bounds"] | None = None,
        lengths: Int[Tensor, " b"] | None = None,
        attention_mask: Bool[Tensor, "b l"] | Integer[Tensor, "b l"] | None = None,
        last_only: bool = False,
    ) -> LMOutput:
        """Return the logits at each position and the state after the last token.

        Sequences of several lengths share a call, each as if it were alone, in one of two ways:
        laid end to end in one row, with ``cu_seqlens``, which is the faster; or padded, with
        ``lengths`` or ``attention_mask``. Padding is left out before the first layer: what lies
        there is never looked up.

        Args:
            tokens: Token ids, int64 or int32, each in ``[0, vocab_size)``. Any ``l >= 0``.
            state: What an earlier call returned, to go on with its sequences; ``None`` begins.
            cu_seqlens: Where each of ``s`` sequences begins and, last, where the last one ends:
                ``0 = cu_seqlens[0] < ... < cu_seqlens[s] = l``, int32 or int64, with ``b = 1``.
                States are then those of ``s`` sequences. Best kept on the CPU: from a GPU it
                is fetched, which waits for the GPU.
            lengths: Tokens of each row, which padding at the right follows. They and the mask
                are fetched from a GPU too.
            attention_mask: 1 or ``True`` at tokens, 0 at padding, which may be at the left or
                at the right of a row; the ones are one run. States are those after each row's
                last token and, coming in, before its first.
            last_only: Score the last token of each row, or of each sequence of a pack, alone:
                ``logits`` are ``(b, 1, v)`` or ``(s, 1, v)``. In prefill this saves most of the
                output layer.

        Returns:
            ``logits`` in the dtype of the parameters, over the padded vocabulary, whose ids
            from ``vocab_size`` on mean nothing; 0 at padding; and the ``state``. Both carry
            gradients.

        Raises:
            ValueError: ``tokens`` are not whole numbers of shape ``(b, l)`` where the
                parameters are, ``state`` is of a model of other sizes or of another number of
                sequences or elsewhere, more than one way is used to tell sequences apart, or
                one that does not fit ``tokens``.
            RuntimeError: The backend that was named cannot run on this device.

        Example:
            >>> model = MambaLM(MambaConfig(d_model=16, n_layer=2, vocab_size=32))
            >>> tokens = torch.randint(32, (1, 12))
            >>> packed = model(tokens, cu_seqlens=torch.tensor([0, 5, 12]))
            >>> alone = model(tokens[:, 5:])
            >>> torch.testing.assert_close(packed.logits[:, 5:], alone.logits)
            >>> mask = torch.tensor([[0] * 5 + [1] * 7])
            >>> padded = model(tokens, attention_mask=mask)
            >>> torch.testing.assert_close(padded.logits[:, 5:], alone.logits)
        """
        # here, so that the output layer has no padding to score
        tokens, cu_seqlens, packing = pack_tokens(tokens, cu_seqlens, lengths, attention_mask)
        x, state = self.backbone(tokens, state, cu_seqlens=cu_seqlens, last_only=last_only)
        logits = self.lm_head(x)
        if packing is not None and not last_only:
            logits = packing.unpack(logits)
        return LMOutput(logits, state)

    def generate(self, tokens: Int[Tensor, "b l"], **settings: Any) -> Int[Tensor, "b l_out"]:
        """Continue ``tokens``, by the settings of ``mambakit.generation.generate``."""
        from mambakit.generation import generate

        return generate(self, tokens, **settings)

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | os.PathLike[str],
        *,
        revision: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        backend: Backend = "auto",
        local_files_only: bool = False,
    ) -> "MambaLM":
        """Read a published model, or one of our own, from a folder or from the Hub.

        Args:
            path_or_id: A folder that ``save_pretrained``, transformers' Mamba or FalconMamba,
                or the authors' ``mamba_ssm`` wrote; or the Hub id of such a model, for instance
                ``"state-spaces/mamba-130m"``, which needs ``pip install 'mambakit[hub]'``.
            revision: Branch, tag or commit on the Hub; ``None`` means its main branch.
            device: Where the parameters go; ``None`` means torch's default.
            dtype: Dtype to convert them to; ``None`` keeps that of the file. Each mixer's
                ``A_log``, ``D`` and the bias of its ``dt_proj`` have at least float32.
            backend: As in ``MambaLM``.
            local_files_only: Take Hub models from the cache and never ask the network.

        Raises:
            ValueError: No folder or repository has that name, or what it holds is no model of
                this package: another architecture, a damaged file, tensors that are missing,
                unexpected, or of another shape or dtype, all of which are listed.
            RuntimeError: The Hub cannot be reached or does not let you in.

        Example:
            >>> MambaLM.from_pretrained("no/such/folder")
            Traceback (most recent call last):
            ...
            ValueError: from_pretrained: there is no folder no/such/folder
        """
        from .checkpoint import load
        from .hub import locate

        folder = locate(path_or_id, revision=revision, local_files_only=local_files_only)
        return load(folder, device, dtype, backend=backend)

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        *,
        layout: Literal["mambakit", "hf", "mamba_ssm"] = "mambakit",
    ) -> None:
        """Write the model to ``folder``, as ``mambakit.models.save`` says.

        Example:
            >>> import tempfile
            >>> model = MambaLM(MambaConfig(d_model=16, n_layer=1, vocab_size=32))
            >>> folder = tempfile.mkdtemp()
            >>> model.save_pretrained(folder, layout="mamba_ssm")
            >>> again = MambaLM.from_pretrained(folder)
            >>> torch.equal(again.lm_head.weight, model.lm_head.weight)
            True
        """
        from .checkpoint import save

        save(self, folder, layout=layout)
