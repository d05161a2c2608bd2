"""Models of odd sizes, and the library of every instruction set that this machine runs."""

import pytest
import torch

from mambakit import MambaConfig, MambaLM
from mambakit.ops import _native

VOCABULARY = 257

# Widths around every vector and none of its multiples, windows of all lengths, each choice of a
# config both ways; and one that has several chunks of rows for each thread.
SIZES = {
    "no window": {"d_model": 24, "d_state": 5, "d_conv": 1, "dt_rank": 1},
    "window of 2": {"d_model": 17, "d_state": 1, "d_conv": 2, "dt_rank": 3, "bias": True},
    "window of 3": {"d_model": 40, "d_state": 16, "d_conv": 3, "conv_bias": False},
    "untied": {"d_model": 24, "d_state": 33, "d_conv": 4, "tie_embeddings": False},
    "window of 5": {"d_model": 8, "d_state": 64, "d_conv": 5, "expand": 1, "dt_rank": 6},
    "norms": {"d_model": 64, "selection_norm_eps": 1e-6},
    "wide": {"d_model": 528, "expand": 3},
}


@pytest.fixture(params=_native.runnable())
def library(request, monkeypatch):
    """The library of one instruction set, in the place of the best one."""
    library = _native.open_library(request.param)
    monkeypatch.setattr(_native, "library", lambda: library)
    return library


@pytest.fixture
def make_model():
    """A model whose logits, states and gates are of the size of 1."""

    def make(dtype=torch.float32, **config):
        sizes = {"d_model": 24, "n_layer": 2, "vocab_size": VOCABULARY} | config
        model = MambaLM(MambaConfig(**sizes)).requires_grad_(False)
        model.backbone.embedding.weight.normal_()
        model.lm_head.weight.normal_(std=0.3)
        for block in model.backbone.layers:
            block.mixer.dt_proj.bias += 3
        return model.to(dtype)

    return make


@pytest.fixture
def draw():
    """Tokens (b, l)."""
    return lambda b, l: torch.randint(VOCABULARY, (b, l))
