"""How checkpoints write a model down: the keys of a config and the names of tensors."""

from collections.abc import Mapping
from typing import Any

from .hf import HF
from .layout import Layout
from .mamba_ssm import MAMBA_SSM
from .own import MAMBAKIT

__all__ = ["HF", "LAYOUTS", "MAMBAKIT", "MAMBA_SSM", "Layout", "recognise"]

LAYOUTS = {layout.name: layout for layout in (MAMBAKIT, HF, MAMBA_SSM)}
"""All layouts by name."""


def recognise(values: Mapping[str, Any]) -> Layout:
    """Tell the layout of a checkpoint by the keys of its config.

    Example:
        >>> recognise({"model_type": "mamba", "hidden_size": 768}).name
        'hf'
        >>> recognise({"d_model": 768, "ssm_cfg": {}, "rms_norm": True}).name
        'mamba_ssm'
        >>> recognise({"d_model": 768, "d_state": 16}).name
        'mambakit'
    """
    # first, because transformers' published configs keep some of mamba_ssm's keys
    if "model_type" in values or "architectures" in values:
        return HF
    if any(key in values for key in MAMBA_SSM.own_keys):
        return MAMBA_SSM
    return MAMBAKIT
