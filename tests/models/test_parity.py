"""The model computes what transformers' Mamba computes from the same weights."""

from dataclasses import replace

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


def ours(peer, backend, config=CONFIG):
    model = MambaLM(config, backend=backend)
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


@pytest.fixture
def padded():
    """Rows of 70, 41, 3 and 1 tokens at the right, and their mask."""
    source = torch.Generator().manual_seed(2)
    tokens = torch.randint(CONFIG.vocab_size, (4, 70), generator=source, device="cpu")
    mask = torch.arange(70) >= 70 - torch.tensor([[70], [41], [3], [1]])
    return tokens.to(torch.get_default_device()), mask.long()


def loss_of_real(logits, tokens, mask):
    wanted = tokens.where(mask.bool(), -100)
    wanted[torch.arange(len(mask)), mask.argmax(1)] = -100  # nothing comes before the first
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), wanted[:, 1:].flatten())


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("backend", ["reference", "parallel", "fused"])
def test_padded_rows_agree_with_theirs(peer, padded, backend, side):
    """Their logits of padding are those of a token that is nothing; ours are zero."""
    if backend == "fused" and (why := why_not_fused("Mamba", torch.get_default_device())):
        pytest.skip(why)
    tokens, mask = padded
    if side == "right":
        tokens, mask = tokens.flip(1), mask.flip(1)
    model, real = ours(peer, backend), mask.bool()
    peer.zero_grad()
    theirs = peer(tokens, attention_mask=mask).logits
    their_loss = loss_of_real(theirs, tokens, mask)
    their_loss.backward()
    logits = model(tokens, attention_mask=mask).logits
    loss = loss_of_real(logits, tokens, mask)
    loss.backward()

    assert_close(logits[real], theirs[real], rtol=1e-5, atol=1e-5)
    assert not logits[~real].any()
    assert_close(loss, their_loss, rtol=1e-5, atol=1e-5)
    expected = dict(peer.named_parameters())
    for name, parameter in model.named_parameters():
        theirs_grad = expected[their_name(name)].grad
        error = (parameter.grad - theirs_grad).abs().max() / theirs_grad.abs().max()
        assert error <= 1e-5, name


def greedy(step, logits, count):
    chosen = []
    for _ in range(count):
        chosen.append(logits[:, -1].argmax(-1, keepdim=True))
        logits = step(chosen[-1])
    return torch.cat(chosen, dim=1)


def test_decoding_after_left_padding_agrees_with_theirs(peer, padded):
    tokens, mask = padded
    model = ours(peer, "auto")
    state = None

    def step(token):
        nonlocal state
        logits, state = model(token, state)
        return logits

    with torch.no_grad():
        logits, state = model(tokens, attention_mask=mask, last_only=True)
        found = greedy(step, logits, 10)
        expected = peer.generate(
            tokens, attention_mask=mask, max_new_tokens=10, do_sample=False, pad_token_id=0,
            eos_token_id=None,
        )  # fmt: skip
    assert torch.equal(found, expected[:, 70:])


def test_decoding_after_right_padding_agrees_with_theirs_of_each_row_alone(peer, padded):
    """With this padding transformers 5.23 decodes from a state that padding has decayed."""
    tokens, mask = (tensor.flip(1) for tensor in padded)
    model, following = ours(peer, "auto"), tokens[:, -1:]
    with torch.no_grad():
        state = model(tokens, attention_mask=mask).state
        logits = model(following, state).logits
        for row, length in enumerate(mask.sum(1).tolist()):
            whole = torch.cat([tokens[row, :length], following[row]])
            theirs = peer(whole[None]).logits[0, -1:]
            assert_close(logits[row], theirs, rtol=1e-5, atol=1e-5)


def test_padded_rows_of_a_model_with_biases_agree_with_theirs_alone(padded):
    """In transformers 5.23 padding at the left reaches the first tokens by in_proj's bias."""
    transformers = pytest.importorskip("transformers")
    sizes = replace(CONFIG, n_layer=2, bias=True)
    peer = transformers.MambaForCausalLM(
        transformers.MambaConfig(
            hidden_size=sizes.d_model, num_hidden_layers=2, vocab_size=sizes.vocab_size,
            state_size=sizes.d_state, use_bias=True,
        )
    ).to(torch.get_default_device())  # fmt: skip
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        tokens, mask = padded
        logits = ours(peer, "auto", sizes)(tokens, attention_mask=mask).logits
        for row, length in enumerate(mask.sum(1).tolist()):
            theirs = peer(tokens[row : row + 1, -length:]).logits
            assert_close(logits[row : row + 1, -length:], theirs, rtol=1e-5, atol=1e-5)
