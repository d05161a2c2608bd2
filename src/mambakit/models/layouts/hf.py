"""The layout of transformers' ``MambaForCausalLM`` and ``FalconMambaForCausalLM``."""

import math
from collections.abc import Mapping
from typing import Any

import torch

from mambakit.models.config import MambaConfig

from .layout import Layout, require, translate

_WORDS = {
    "hidden_size": "d_model",
    "num_hidden_layers": "n_layer",
    "vocab_size": "vocab_size",
    "state_size": "d_state",
    "conv_kernel": "d_conv",
    "expand": "expand",
    "time_step_rank": "dt_rank",
    "tie_word_embeddings": "tie_embeddings",
    "residual_in_fp32": "residual_in_fp32",
    "layer_norm_epsilon": "norm_eps",
    "use_bias": "bias",
    "use_conv_bias": "conv_bias",
    "time_step_min": "dt_min",
    "time_step_max": "dt_max",
    "time_step_floor": "dt_init_floor",
}
_SIZES = ("hidden_size", "num_hidden_layers", "vocab_size")
# Ours: transformers has no padding of its own, so its vocabulary is our padded one.
_UNPADDED, _MULTIPLE = "unpadded_vocab_size", "pad_vocab_size_multiple"


class _HF(Layout):
    """Keys that concern neither sizes nor arithmetic are passed over, as transformers does."""

    name = "hf"

    def read_config(self, values: Mapping[str, Any]) -> MambaConfig:
        require(values, "model_type", ("mamba", "falcon_mamba"))
        if "model_type" not in values:
            raise ValueError("model_type must be given: 'mamba' or 'falcon_mamba'")
        names = values.get("architectures") or ["ForCausalLM"]
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"architectures must be a list of names, got {names!r}")
        if not any(name.endswith("ForCausalLM") for name in names):
            raise ValueError(
                f"architectures must hold a language model, got {', '.join(names)}"
            )
        require(values, "hidden_act", ("silu", "swish"))
        require(values, "quantization_config", (None,))
        missing = [key for key in _SIZES if key not in values]
        if missing:
            raise ValueError(f"{', '.join(missing)} must be given")

        ours = translate(values, _WORDS) | {_MULTIPLE: 1}
        if "intermediate_size" in values:
            # it wins over expand, which FalconMamba's published config has wrong
            ours["expand"] = _expand(values["intermediate_size"], values["hidden_size"])
        if ours.get("dt_rank") == _usual_rank(values["hidden_size"]):
            ours["dt_rank"] = "auto"
        if values["model_type"] == "falcon_mamba":
            ours["selection_norm_eps"] = values.get("mixer_rms_eps", 1e-6)
        if _UNPADDED in values:
            ours["vocab_size"] = values[_UNPADDED]
            ours[_MULTIPLE] = values.get(_MULTIPLE, 1)
        config = MambaConfig.from_dict(ours)
        if config.padded_vocab_size != values["vocab_size"]:
            raise ValueError(
                f"vocab_size must be {config.padded_vocab_size}, which {_UNPADDED} and "
                f"{_MULTIPLE} give, got {values['vocab_size']}"
            )
        return config

    def write_config(self, config: MambaConfig, dtype: torch.dtype) -> dict[str, Any]:
        falcon = config.selection_norm_eps is not None
        family = "FalconMamba" if falcon else "Mamba"
        values = config.to_dict()
        return {
            "architectures": [f"{family}ForCausalLM"],
            "model_type": "falcon_mamba" if falcon else "mamba",
            **{theirs: values[ours] for theirs, ours in _WORDS.items()},
            "vocab_size": config.padded_vocab_size,
            _UNPADDED: config.vocab_size,
            _MULTIPLE: config.pad_vocab_size_multiple,
            "time_step_rank": config.rank,
            "intermediate_size": config.d_inner,
            **({"mixer_rms_eps": config.selection_norm_eps} if falcon else {}),
            "hidden_act": "silu",
            "torch_dtype": str(dtype).removeprefix("torch."),
            # Left out, they would be token 0.
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": None,
        }

    def our_name(self, name: str) -> str:
        return name.replace("backbone.embeddings.", "backbone.embedding.")

    def their_name(self, name: str) -> str:
        return name.replace("backbone.embedding.", "backbone.embeddings.")


def _usual_rank(m: Any) -> int | None:
    return math.ceil(m / 16) if isinstance(m, int) else None


def _expand(d: Any, m: Any) -> int:
    whole = all(isinstance(size, int) and size >= 1 for size in (d, m))
    if not whole or d % m:
        raise ValueError(f"intermediate_size must be a multiple of hidden_size={m}, got {d}")
    return d // m


HF = _HF()
