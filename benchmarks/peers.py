"""transformers' Mamba and ours, of one size and with the same weights."""

import os

import torch
from torch import nn

from mambakit import MambaConfig, MambaLM

# Nothing here is downloaded: the peer gets our weights, and looking for kernels costs time.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

VOCABULARY = 50280


def pair(
    *, use_mambapy: bool, d_model: int = 768, n_layer: int = 24, vocabulary: int = VOCABULARY
) -> tuple[MambaLM, nn.Module]:
    """Build both models, float32 and with the published initialisation."""
    from transformers import MambaConfig as PeerConfig, MambaForCausalLM

    torch.manual_seed(0)
    ours = MambaLM(MambaConfig(d_model=d_model, n_layer=n_layer, vocab_size=vocabulary))
    config = PeerConfig(
        vocab_size=vocabulary,
        hidden_size=d_model,
        num_hidden_layers=n_layer,
        use_mambapy=use_mambapy,
        use_cache=False,
    )
    peer = MambaForCausalLM(config)
    peer.load_state_dict({peer_name(k): t for k, t in ours.state_dict().items()}, strict=True)
    return ours, peer


def peer_name(name: str) -> str:
    """Return what transformers calls our parameter."""
    return name.replace("backbone.embedding.", "backbone.embeddings.")
