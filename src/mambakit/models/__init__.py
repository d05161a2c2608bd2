"""Whole models: configs, the backbone, the language model, and their checkpoints."""

from .backbone import Backbone
from .checkpoint import load, save
from .config import MambaConfig
from .language import LMOutput, MambaLM
from .state import ModelState

__all__ = ["Backbone", "LMOutput", "MambaConfig", "MambaLM", "ModelState", "load", "save"]
