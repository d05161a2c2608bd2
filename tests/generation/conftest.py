"""Models whose next token depends on the past, and some prompts."""

import pytest
import torch

from mambakit import MambaConfig, MambaLM


@pytest.fixture(scope="session")
def make_model():
    def make(vocab_size, *, d_model=16, n_layer=2):
        config = MambaConfig(d_model, n_layer, vocab_size, d_state=4, tie_embeddings=False)
        model = MambaLM(config)
        with torch.no_grad():
            # So wide that the next token depends on the past, also on that before the last
            # token (another past changes two of three), and not so wide as to be certain.
            model.backbone.embedding.weight.normal_()
            model.lm_head.weight.normal_(std=0.5)
            for block in model.backbone.layers:
                block.mixer.out_proj.weight *= 32
                block.mixer.dt_proj.bias += 3
        return model

    return make


@pytest.fixture
def model(make_model):
    return make_model(21)


@pytest.fixture
def prompts():
    """Prompts of different lengths, two of them of one."""
    return [torch.randint(21, (l,)) for l in (3, 1, 5, 3)]
