"""The sizes and choices that make a model, with their rules."""

import dataclasses
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

PUBLISHED = {
    "130m": (768, 24),
    "370m": (1024, 48),
    "790m": (1536, 48),
    "1.4b": (2048, 48),
    "2.8b": (2560, 64),
}
"""Width and number of layers of the published models, by name."""

_SIZES = 2**31  # far above any model, and torch can still multiply two of them


@dataclass(frozen=True)
class MambaConfig:
    """Describe a Mamba language model; a value that never changes.

    Attributes:
        d_model: Width ``m`` of the residual stream.
        n_layer: Number of blocks.
        vocab_size: Number of token ids that mean something.
        d_state: State size ``n`` of each channel, from 1 to 256.
        d_conv: Width ``w`` of the convolution.
        expand: Inner channels for each channel of the model: ``d = expand d_model``.
        dt_rank: Rank ``r`` of the step's projection; ``"auto"`` is ``ceil(d_model / 16)``.
        pad_vocab_size_multiple: Embedding and logits get rows of no meaning, up to the next
            multiple of this number.
        tie_embeddings: Whether the output layer is the embedding's own matrix.
        residual_in_fp32: Whether the residual stream stays float32 in a model of shorter dtype.
        norm_eps: ``eps`` of every RMSNorm.
        bias: Whether the mixers' ``in_proj`` and ``out_proj`` have a bias.
        conv_bias: Whether the convolutions have a bias.
        selection_norm_eps: ``eps`` of FalconMamba's norms of the low-rank step, ``B`` and
            ``C``, which have no gain; ``None`` is a model without these norms.
        dt_min: Smallest step at initialisation.
        dt_max: Largest step at initialisation.
        dt_init_floor: Steps drawn below it are raised to it.

    Raises:
        ValueError: A value breaks its rule; the message names it.

    Example:
        >>> config = MambaConfig(d_model=64, n_layer=2, vocab_size=250)
        >>> config.padded_vocab_size, config.d_inner, config.rank
        (256, 128, 4)
        >>> MambaConfig.from_dict(config.to_dict()) == config
        True
    """

    d_model: int
    n_layer: int
    vocab_size: int
    d_state: int = 16
    d_conv: int = 4
    expand: int = 2
    dt_rank: int | Literal["auto"] = "auto"
    pad_vocab_size_multiple: int = 8
    tie_embeddings: bool = True
    residual_in_fp32: bool = True
    norm_eps: float = 1e-5
    bias: bool = False
    conv_bias: bool = True
    selection_norm_eps: float | None = None
    dt_min: float = 1e-3
    dt_max: float = 1e-1
    dt_init_floor: float = 1e-4

    def __post_init__(self) -> None:
        for name in (
            "d_model", "n_layer", "vocab_size", "d_state", "d_conv", "expand",
            "pad_vocab_size_multiple",
        ):  # fmt: skip
            _check_count(name, getattr(self, name))
        if self.d_state > 256:
            raise ValueError(f"MambaConfig: d_state must be at most 256, got {self.d_state}")
        if self.dt_rank != "auto":
            _check_count("dt_rank", self.dt_rank, or_auto=' or "auto"')
        for name in ("tie_embeddings", "residual_in_fp32", "bias", "conv_bias"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(
                    f"MambaConfig: {name} must be true or false, got {getattr(self, name)!r}"
                )
        for name in ("norm_eps", "selection_norm_eps", "dt_min", "dt_max", "dt_init_floor"):
            value = getattr(self, name)
            if value is None and name == "selection_norm_eps":
                continue
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not 0 < value < math.inf:
                raise ValueError(
                    f"MambaConfig: {name} must be a positive, finite number, got {value!r}"
                )
        if self.dt_min > self.dt_max:
            raise ValueError(
                f"MambaConfig: dt_min must be at most dt_max={self.dt_max}, got {self.dt_min}"
            )

    @classmethod
    def published(cls, name: str, **changes: Any) -> "MambaConfig":
        """Return the config of a published size, with ``changes`` to other attributes.

        The sizes are ``"130m"``, ``"370m"``, ``"790m"``, ``"1.4b"`` and ``"2.8b"``; all have
        the vocabulary of GPT-NeoX, 50280 tokens.

        Raises:
            ValueError: No such size was published.

        Example:
            >>> MambaConfig.published("130m").d_model
            768
        """
        if name not in PUBLISHED:
            raise ValueError(
                f"MambaConfig: published name must be one of {', '.join(PUBLISHED)}, "
                f"got {name!r}"
            )
        d_model, n_layer = PUBLISHED[name]
        return cls(**{"d_model": d_model, "n_layer": n_layer, "vocab_size": 50280} | changes)

    @property
    def d_inner(self) -> int:
        """Channels ``d`` of the scan."""
        return self.expand * self.d_model

    @property
    def rank(self) -> int:
        """Rank ``r`` of the step's projection, as a number."""
        return math.ceil(self.d_model / 16) if self.dt_rank == "auto" else self.dt_rank

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding, and logits at each position."""
        multiple = self.pad_vocab_size_multiple
        return math.ceil(self.vocab_size / multiple) * multiple

    def to_dict(self) -> dict[str, int | float | bool | str | None]:
        """Return all attributes by name: numbers, booleans, strings and ``None`` only."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "MambaConfig":
        """Build a config from what ``to_dict`` returned.

        Raises:
            ValueError: A key is unknown (the nearest known one is named), a size that has no
                default is missing, or a value breaks its rule.
        """
        fields = dataclasses.fields(cls)
        known = [field.name for field in fields]
        for key in values:
            if key not in known:
                near = difflib.get_close_matches(str(key), known, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise ValueError(f"MambaConfig: there is no {key!r}{hint}")
        missing = [
            field.name
            for field in fields
            if field.default is dataclasses.MISSING and field.name not in values
        ]
        if missing:
            raise ValueError(f"MambaConfig: {', '.join(missing)} must be given")
        return cls(**values)


def _check_count(name: str, value: object, or_auto: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(
            f"MambaConfig: {name} must be a whole number of at least 1{or_auto}, got {value!r}"
        )
    if value >= _SIZES:
        raise ValueError(f"MambaConfig: {name} must be below 2**31, got {value}")
