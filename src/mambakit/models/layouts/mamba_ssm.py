"""The layout of the authors' ``mamba_ssm``, in which ``state-spaces/mamba-*`` are published."""

from collections.abc import Mapping
from typing import Any

import torch

from mambakit.models.config import MambaConfig

from .layout import PICKLED, Layout, require

_MODEL = (
    "d_model",
    "n_layer",
    "vocab_size",
    "pad_vocab_size_multiple",
    "tie_embeddings",
    "residual_in_fp32",
)
_MIXER = (
    "d_state",
    "d_conv",
    "expand",
    "dt_rank",
    "bias",
    "conv_bias",
    "dt_min",
    "dt_max",
    "dt_init_floor",
)
# Keys that change nothing in a model whose weights are given: how dt_proj was drawn, and which
# of several equal implementations runs.
_MIXER_WITHOUT_EFFECT = {"dt_init", "dt_scale", "use_fast_path", "layer"}
_NORM_EPS = 1e-5  # their code has no key for it


class _MambaSSM(Layout):
    name = "mamba_ssm"
    weights = PICKLED
    repeats_tied = True
    # fused_add_norm chooses one of two equal implementations, and attn_cfg describes layers
    # that attn_layer_idx must not ask for
    own_keys = (
        "ssm_cfg",
        "rms_norm",
        "fused_add_norm",
        "d_intermediate",
        "attn_layer_idx",
        "attn_cfg",
    )

    def read_config(self, values: Mapping[str, Any]) -> MambaConfig:
        require(values, "rms_norm", (True,))
        require(values, "d_intermediate", (0,))
        require(values, "attn_layer_idx", ([], None))
        _refuse_others(values, {*_MODEL, *self.own_keys}, "the config")
        mixer = values.get("ssm_cfg") or {}
        if not isinstance(mixer, Mapping):
            raise ValueError(f"ssm_cfg must be an object, got {mixer!r}")
        require(mixer, "layer", ("Mamba1",))
        _refuse_others(mixer, {*_MIXER, *_MIXER_WITHOUT_EFFECT}, "ssm_cfg")
        return MambaConfig.from_dict(
            {key: value for key, value in values.items() if key in _MODEL}
            | {key: value for key, value in mixer.items() if key in _MIXER}
        )

    def write_config(self, config: MambaConfig, dtype: torch.dtype) -> dict[str, Any]:
        if config.norm_eps != _NORM_EPS:
            raise ValueError(f"norm_eps must be {_NORM_EPS}, got {config.norm_eps}")
        if config.selection_norm_eps is not None:
            raise ValueError(
                f"selection_norm_eps must be None, got {config.selection_norm_eps}"
            )
        values = config.to_dict()
        default = MambaConfig(1, 1, 1).to_dict()
        return {
            **{key: values[key] for key in _MODEL},
            "d_intermediate": 0,
            "ssm_cfg": {key: values[key] for key in _MIXER if values[key] != default[key]},
            "attn_layer_idx": [],
            "attn_cfg": {},
            "rms_norm": True,
            "fused_add_norm": True,
        }


def _refuse_others(values: Mapping[str, Any], known: set[str], where: str) -> None:
    others = sorted(str(key) for key in values if key not in known)
    if others:
        raise ValueError(f"{where} has {', '.join(others)}, which no model of this package has")


MAMBA_SSM = _MambaSSM()
