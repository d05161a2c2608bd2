"""What a layout is."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch

from mambakit.models.config import MambaConfig

SAFETENSORS, PICKLED = "model.safetensors", "pytorch_model.bin"


class Layout(ABC):
    """One way of writing a config and of naming tensors.

    Attributes:
        name: What users call it.
        weights: The file that holds the tensors when we write it.
        repeats_tied: Whether a tied matrix has an entry under each of its names.
    """

    name: str
    weights: str = SAFETENSORS
    repeats_tied: bool = False

    @abstractmethod
    def read_config(self, values: Mapping[str, Any]) -> MambaConfig:
        """Return the config that ``values`` describe.

        Raises:
            ValueError: They describe a model that this package does not have, or none.
        """

    @abstractmethod
    def write_config(self, config: MambaConfig, dtype: torch.dtype) -> dict[str, Any]:
        """Describe a model whose projections have ``dtype``.

        Raises:
            ValueError: The layout has no words for this model.
        """

    def our_name(self, name: str) -> str:
        """Return what ``MambaLM`` calls the tensor that the file calls ``name``."""
        return name

    def their_name(self, name: str) -> str:
        """Return what the file calls the parameter ``name`` of ``MambaLM``."""
        return name


def require(values: Mapping[str, Any], key: str, allowed: tuple[Any, ...]) -> None:
    """Refuse a config whose ``key`` says something else than what this package computes.

    Raises:
        ValueError: ``key`` is there and is none of ``allowed``.
    """
    if key in values and values[key] not in allowed:
        words = " or ".join(map(repr, allowed))
        raise ValueError(f"{key} must be {words}, got {values[key]!r}")


def translate(values: Mapping[str, Any], words: Mapping[str, str]) -> dict[str, Any]:
    """Rename the keys of ``values`` that are in ``words``, and leave the others out."""
    return {ours: values[theirs] for theirs, ours in words.items() if theirs in values}
