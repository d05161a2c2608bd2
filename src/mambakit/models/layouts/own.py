"""This package's own layout: ``MambaConfig`` as it is, parameters under their own names."""

from collections.abc import Mapping
from typing import Any

import torch

from mambakit.models.config import MambaConfig

from .layout import Layout


class _Mambakit(Layout):
    name = "mambakit"

    def read_config(self, values: Mapping[str, Any]) -> MambaConfig:
        return MambaConfig.from_dict(values)

    def write_config(self, config: MambaConfig, dtype: torch.dtype) -> dict[str, Any]:
        return config.to_dict()


MAMBAKIT = _Mambakit()
