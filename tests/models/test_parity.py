"""The model computes what transformers' Mamba computes from the same weights."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from mambakit import MambaConfig, MambaLM
from mambakit.ops._backends import why_not_fused

CONFIG = MambaConfig(d_model=32, n_layer=3, vocab_size=60, d_state=8, pad_vocab_size_multiple=1)


def their_name(name):
    return name.replace("backbone.embedding.", "backbone.embeddings.")


@pytest.fixture(scope="module")
def peer(chosen_device):
    """Transformers' model with random weights of a trained model's spread."""
    transformers = pytest.importorskip("transformers")
    config = transformers.MambaConfig(
        hidden_size=CONFIG.d_model,
        num_hidden_layers=CONFIG.n_layer,
        vocab_size=CONFIG.vocab_size,
        state_size=CONFIG.d_state,
    )
    torch.manual_seed(0)
    model = transformers.MambaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.to(chosen_device)


def ours(peer, backend):
    model = MambaLM(CONFIG, backend=backend)
    theirs = dict(peer.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(theirs[their_name(name)])
    return model


@pytest.fixture
def tokens():
    source = torch.Generator().manual_seed(1)
    tokens = torch.randint(CONFIG.vocab_size, (2, 70), generator=source, device="cpu")
    return tokens.to(torch.get_default_device())


def loss_of(logits, tokens):
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


@pytest.mark.parametrize("backend", ["reference", "parallel", "fused"])
def test_logits_loss_and_every_gradient_agree(peer, tokens, backend):
    if backend == "fused" and (why := why_not_fused("Mamba", torch.get_default_device())):
        pytest.skip(why)
    model = ours(peer, backend)
    peer.zero_grad()
    theirs = peer(tokens, labels=tokens)
    theirs.loss.backward()
    logits = model(tokens).logits
    loss = loss_of(logits, tokens)
    loss.backward()

    assert_close(logits, theirs.logits, rtol=1e-5, atol=1e-5)
    assert_close(loss, theirs.loss, rtol=1e-5, atol=1e-5)
    expected = {name: parameter.grad for name, parameter in peer.named_parameters()}
    for name, parameter in model.named_parameters():
        theirs_grad = expected.pop(their_name(name))
        error = (parameter.grad - theirs_grad).abs().max() / theirs_grad.abs().max()
        assert error <= 1e-5, name
    assert not expected


def test_decoding_step_by_step_agrees_with_their_full_forward(peer, tokens):
    model = ours(peer, "auto")
    with torch.no_grad():
        logits, state = model(tokens[:, :40])
        pieces = [logits]
        for t in range(40, tokens.shape[1]):
            logits, state = model(tokens[:, t : t + 1], state)
            pieces.append(logits)
        assert_close(torch.cat(pieces, dim=1), peer(tokens).logits, rtol=1e-5, atol=1e-5)
