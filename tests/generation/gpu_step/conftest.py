"""Models of odd sizes, and the emulator in the place of a GPU."""

import copy

import pytest
import torch
from torch import nn

from mambakit import MambaConfig, MambaLM
from mambakit.generation.gpu_step import multiplication, packing, step
from mambakit.ops import _cuda
from tests import emulator

VOCABULARY = 257

# Widths of no whole pieces of 16 bytes, windows of all lengths, a config's choices both ways.
SIZES = {
    "no window": {"d_model": 24, "d_state": 5, "d_conv": 1, "dt_rank": 1},
    "window of 2": {"d_model": 17, "d_state": 1, "d_conv": 2, "dt_rank": 3, "bias": True},
    "window of 3": {"d_model": 40, "d_state": 16, "d_conv": 3, "conv_bias": False},
    "untied": {"d_model": 24, "d_state": 33, "d_conv": 4, "tie_embeddings": False},
    "window of 5": {"d_model": 8, "d_state": 256, "d_conv": 5, "expand": 1, "dt_rank": 20},
    "norms": {"d_model": 64, "selection_norm_eps": 1e-6},
}


@pytest.fixture(autouse=True)
def emulated(monkeypatch, chosen_device):
    """Let steps run on this device: on the GPU, or on the emulator."""
    if chosen_device.type == "cuda":
        return
    why_not = emulator.unavailable()
    if why_not is not None:
        pytest.skip(why_not)
    monkeypatch.setattr(_cuda, "kernel", emulator.kernel)
    monkeypatch.setattr(_cuda, "multiprocessors", lambda _: emulator.MULTIPROCESSORS)
    monkeypatch.setattr(_cuda, "shared_memory", lambda _: emulator.SHARED_MEMORY)
    monkeypatch.setattr(multiplication, "multiply", multiply)
    monkeypatch.setattr(step, "_DEVICE", "cpu")
    monkeypatch.setattr(step, "_why_no_kernels", lambda _: None)


def multiply(a, b, out):
    """What PyTorch's products of short numbers are on a GPU: sums in float32, rounded once."""
    out.copy_(a.float() @ b.float())


@pytest.fixture
def make_model():
    """A model whose logits, states and gates are of the size of 1, all parameters at random."""

    def make(dtype=torch.float32, **config):
        sizes = {"d_model": 24, "n_layer": 2, "vocab_size": VOCABULARY, "d_state": 5} | config
        model = MambaLM(MambaConfig(**sizes)).requires_grad_(False)
        model.backbone.embedding.weight.normal_()
        model.lm_head.weight.normal_(std=0.3)
        model.backbone.norm_f.weight.normal_(mean=1, std=0.3)
        for block in model.backbone.layers:
            block.norm.weight.normal_(mean=1, std=0.3)
            block.mixer.D.normal_(mean=1, std=0.3)
            block.mixer.dt_proj.bias += 3
            for linear in (block.mixer.in_proj, block.mixer.out_proj):
                if linear.bias is not None:
                    linear.bias.normal_(std=0.5)
        return model.to(dtype)

    return make


@pytest.fixture
def as_read():
    """A float32 copy of a model with the values that a step's weights stand for."""

    def read(model, weights):
        result = copy.deepcopy(model).float()
        storage = packing.storage(model, weights)

        def values(matrix):
            packed = packing.pack(matrix, storage)
            wide = packed.weights[:, : matrix.shape[1]].float()
            wide = wide if packed.scales is None else wide * packed.scales[:, None]
            return nn.Parameter(wide, requires_grad=False)

        result.lm_head.weight = values(model.lm_head.weight)
        for block, source in zip(result.backbone.layers, model.backbone.layers, strict=True):
            for name in ("in_proj", "x_proj", "dt_proj", "out_proj"):
                weight = getattr(source.mixer, name).weight
                getattr(block.mixer, name).weight = values(weight)
        return result

    return read


@pytest.fixture
def draw():
    """Tokens (b, l)."""
    return lambda b, l: torch.randint(VOCABULARY, (b, l))
