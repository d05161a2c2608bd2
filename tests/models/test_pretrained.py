"""Laws of public checkpoints: transformers' and the authors' models come and go unchanged."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from mambakit import MambaConfig, MambaLM
from mambakit.models import load, save

FAMILIES = ("mamba", "falcon")
SIZES = {"num_hidden_layers": 2, "hidden_size": 32, "state_size": 8, "vocab_size": 61}


def make_peer(family, **changes):
    """Transformers' model with random weights of a trained model's spread."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if family == "mamba":
        config = transformers.MambaConfig(**SIZES | changes)
        model = transformers.MambaForCausalLM(config)
    else:
        # as published: untied, and an expand that intermediate_size overrules
        published = {"tie_word_embeddings": False, "expand": 16, "intermediate_size": 64}
        config = transformers.FalconMambaConfig(**SIZES | published | changes)
        model = transformers.FalconMambaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture(scope="module", params=FAMILIES)
def peer(request):
    return make_peer(request.param)


@pytest.fixture(scope="module")
def mamba():
    return make_peer("mamba")


@pytest.fixture
def tokens():
    # Falcon's norms divide by what may be close to zero: there are draws on which its gradients
    # in float32, theirs and ours, are off by 2e-5
    return torch.randint(61, (2, 40), generator=torch.Generator().manual_seed(3))


def write_config(peer, folder):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(peer.config.to_dict()))


def write_whole(peer, folder):
    peer.save_pretrained(folder)


def write_shards(peer, folder):
    peer.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2


def write_bin(peer, folder):
    write_config(peer, folder)
    torch.save(peer.state_dict(), folder / "pytorch_model.bin")


def write_bin_shards(peer, folder):
    write_config(peer, folder)
    tensors = list(peer.state_dict().items())
    files = {"one.bin": dict(tensors[:7]), "two.bin": dict(tensors[7:])}
    for file, part in files.items():
        torch.save(part, folder / file)
    weight_map = {name: file for file, part in files.items() for name in part}
    path = folder / "pytorch_model.bin.index.json"
    path.write_text(json.dumps({"weight_map": weight_map}))


WAYS = (write_whole, write_shards, write_bin, write_bin_shards)


def write_as_the_authors(peer, folder):
    """What mamba_ssm's ``save_pretrained`` writes of the same weights."""
    folder.mkdir()
    config = peer.config
    ours = {
        "d_model": config.hidden_size,
        "d_intermediate": 0,
        "n_layer": config.num_hidden_layers,
        "vocab_size": config.vocab_size,
        "ssm_cfg": {"d_state": config.state_size, "layer": "Mamba1"},
        "attn_layer_idx": [],
        "attn_cfg": {},
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 1,
        "tie_embeddings": config.tie_word_embeddings,
    }
    (folder / "config.json").write_text(json.dumps(ours))
    tensors = {
        name.replace("embeddings", "embedding"): tensor
        for name, tensor in peer.state_dict().items()
    }
    assert "lm_head.weight" in tensors
    torch.save(tensors, folder / "pytorch_model.bin")


def their_name(name):
    return name.replace("backbone.embedding.", "backbone.embeddings.")


def agrees(model, peer):
    """All parameters are the peer's, bit for bit, and there are no others."""
    expected = dict(peer.named_parameters())
    for name, parameter in model.named_parameters():
        assert_close(parameter, expected.pop(their_name(name)), rtol=0, atol=0, msg=name)
    assert not expected


@pytest.mark.parametrize("write", WAYS)
def test_every_way_of_storing_them_gives_the_same_weights(peer, tmp_path, write):
    write(peer, tmp_path / "theirs")
    agrees(MambaLM.from_pretrained(tmp_path / "theirs"), peer)


@pytest.fixture
def mask(tokens):
    """One row with padding at the left and one without."""
    mask = torch.ones_like(tokens)
    mask[1, :27] = 0
    return mask


@pytest.mark.parametrize("padded", [False, True])
def test_logits_loss_and_every_gradient_agree(peer, tokens, mask, tmp_path, padded):
    write_whole(peer, tmp_path)
    model = MambaLM.from_pretrained(tmp_path)
    mask = mask if padded else torch.ones_like(tokens)
    real, labels = mask.bool(), tokens.masked_fill(mask == 0, -100)
    if padded:
        labels[1, 27] = -100  # which they would foretell from padding
    peer.zero_grad()
    theirs = peer(tokens, attention_mask=mask if padded else None, labels=labels)
    theirs.loss.backward()
    logits = model(tokens, attention_mask=mask if padded else None).logits
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    loss.backward()

    assert_close(logits[real], theirs.logits[real], rtol=1e-5, atol=1e-5)
    assert_close(loss, theirs.loss, rtol=1e-5, atol=1e-5)
    expected = {name: parameter.grad for name, parameter in peer.named_parameters()}
    for name, parameter in model.named_parameters():
        theirs_grad = expected.pop(their_name(name))
        error = (parameter.grad - theirs_grad).abs().max() / theirs_grad.abs().max()
        assert error <= 1e-5, name
    assert not expected


def test_greedy_tokens_agree(peer, tokens, tmp_path):
    write_whole(peer, tmp_path)
    model = MambaLM.from_pretrained(tmp_path)
    theirs = peer.generate(tokens, max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert torch.equal(model.generate(tokens, max_new_tokens=12, temperature=0), theirs)


@pytest.mark.parametrize("changes", [{"use_bias": True, "use_conv_bias": False}, {"expand": 3}])
def test_other_shapes_agree(tokens, tmp_path, changes):
    peer = make_peer("mamba", conv_kernel=3, time_step_rank=5, **changes)
    write_whole(peer, tmp_path)
    logits = MambaLM.from_pretrained(tmp_path)(tokens).logits
    assert_close(logits, peer(tokens).logits, rtol=1e-5, atol=1e-5)


def test_transformers_reads_what_we_write(peer, tokens, tmp_path):
    write_whole(peer, tmp_path / "theirs")
    model = MambaLM.from_pretrained(tmp_path / "theirs")
    model.save_pretrained(tmp_path / "ours", layout="hf")
    again, told = type(peer).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_close(again(tokens).logits, peer(tokens).logits, rtol=0, atol=0)
    with safe_open(tmp_path / "ours" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_transformers_reads_a_short_model_of_ours_in_its_dtype(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = MambaLM(MambaConfig(d_model=16, n_layer=1, vocab_size=21), dtype=torch.bfloat16)
    model.save_pretrained(tmp_path, layout="hf")
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert peer.dtype == torch.bfloat16
    theirs = dict(peer.named_parameters())
    for name, parameter in model.named_parameters():
        assert_close(parameter.bfloat16(), theirs[their_name(name)], rtol=0, atol=0)


@pytest.mark.parametrize("tie", [True, False])
def test_the_authors_layout_gives_the_same_model(tokens, tmp_path, tie):
    peer = make_peer("mamba", tie_word_embeddings=tie)
    write_as_the_authors(peer, tmp_path / "theirs")
    model = MambaLM.from_pretrained(tmp_path / "theirs")
    agrees(model, peer)
    assert (model.lm_head.weight is model.backbone.embedding.weight) == tie
    assert_close(model(tokens).logits, peer(tokens).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tie", [True, False])
def test_what_we_write_for_the_authors_is_what_they_write(tmp_path, tie):
    peer = make_peer("mamba", tie_word_embeddings=tie)
    write_as_the_authors(peer, tmp_path / "theirs")
    model = MambaLM.from_pretrained(tmp_path / "theirs")
    model.save_pretrained(tmp_path / "ours", layout="mamba_ssm")
    ours, theirs = (
        torch.load(tmp_path / name / "pytorch_model.bin", weights_only=True)
        for name in ("ours", "theirs")
    )
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert_close(ours[name], tensor, rtol=0, atol=0)
    shared = ours["lm_head.weight"].data_ptr() == ours["backbone.embedding.weight"].data_ptr()
    assert shared == tie
    written, read = (
        json.loads((tmp_path / name / "config.json").read_text()) for name in ("ours", "theirs")
    )
    assert written["ssm_cfg"] | {"layer": "Mamba1"} == read["ssm_cfg"]
    assert written | {"ssm_cfg": 0} == read | {"ssm_cfg": 0}


LAYOUTS = ("mambakit", "hf", "mamba_ssm")


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_tour_of_the_layouts_changes_no_bit(tmp_path, dtype, tie):
    config = MambaConfig(
        d_model=12, n_layer=2, vocab_size=21, d_state=4, tie_embeddings=tie, bias=True
    )
    first = MambaLM(config, dtype=dtype)
    with torch.no_grad():
        first.backbone.norm_f.weight[:3] = torch.tensor([float("nan"), float("inf"), -0.0])
    model = first
    for i, layout in enumerate([*LAYOUTS, *reversed(LAYOUTS)]):
        model.save_pretrained(tmp_path / str(i), layout=layout)
        model = MambaLM.from_pretrained(tmp_path / str(i))
        assert model.config == config
        for (name, parameter), (other, expected) in zip(
            model.named_parameters(), first.named_parameters(), strict=True
        ):
            assert name == other
            assert_close(parameter, expected, rtol=0, atol=0, equal_nan=True, msg=name)
            assert getattr(parameter, "_no_weight_decay", 0) == getattr(
                expected, "_no_weight_decay", 0
            )


def test_a_tied_matrix_may_have_either_name(mamba, tmp_path):
    write_whole(mamba, tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"] = tensors.pop("backbone.embeddings.weight")
    save_file(tensors, path)
    agrees(load(tmp_path), mamba)
    save_file(tensors | {"backbone.embedding.weight": tensors["lm_head.weight"].clone()}, path)
    agrees(load(tmp_path), mamba)


def test_a_tied_matrix_with_two_values_is_refused(mamba, tmp_path):
    write_bin(mamba, tmp_path)
    tensors = mamba.state_dict()
    tensors["lm_head.weight"] = tensors["lm_head.weight"] + 1
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    with pytest.raises(
        ValueError, match=r"lm_head\.weight and backbone\.embeddings\.weight differ$"
    ):
        load(tmp_path)


def test_what_does_not_fit_is_listed_together_in_the_files_own_names(mamba, tmp_path):
    write_bin(mamba, tmp_path)
    tensors = mamba.state_dict()
    del tensors["backbone.embeddings.weight"], tensors["lm_head.weight"]
    tensors["backbone.layers.0.mixer.in_proj.lora"] = torch.ones(1)
    tensors["backbone.layers.0.mixer.D"] = torch.ones(5)
    tensors["backbone.norm_f.weight"] = torch.ones(32).to(torch.float8_e4m3fn)
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="does not fit the config beside it") as caught:
        load(tmp_path)
    message = str(caught.value)
    assert "missing: backbone.embeddings.weight;" in message
    assert "unexpected: backbone.layers.0.mixer.in_proj.lora;" in message
    assert "of another shape: backbone.layers.0.mixer.D (5,) instead of (64,);" in message
    assert message.endswith("weights cannot have: backbone.norm_f.weight float8_e4m3fn")


def test_a_mixture_of_dtypes_needs_a_choice(mamba, tmp_path):
    write_bin(mamba, tmp_path)
    tensors = mamba.state_dict()
    tensors["backbone.norm_f.weight"] = tensors["backbone.norm_f.weight"].half()
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    with pytest.raises(
        ValueError, match=r"one dtype, got float32 \(.*\), float16 \(backbone\.norm_f\.weight\)"
    ):
        load(tmp_path)
    assert load(tmp_path, dtype=torch.float32).backbone.norm_f.weight.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.complex64])
def test_a_dtype_that_no_model_has_is_refused(mamba, tmp_path, dtype):
    write_whole(mamba, tmp_path)
    with pytest.raises(ValueError, match="dtype must be float64, 32, 16 or bfloat16, got"):
        MambaLM.from_pretrained(tmp_path, dtype=dtype)


def test_dtype_device_and_backend_are_the_callers(mamba, tmp_path):
    write_whole(mamba, tmp_path)
    model = MambaLM.from_pretrained(
        str(tmp_path), dtype=torch.bfloat16, device="cpu", backend="parallel"
    )
    mixer = model.backbone.layers[0].mixer
    assert mixer.in_proj.weight.dtype == torch.bfloat16
    assert mixer.A_log.dtype == torch.float32
    assert mixer.backend == "parallel"
    with torch.device("meta"):
        assert MambaLM.from_pretrained(tmp_path).device == torch.device("meta")


@pytest.mark.parametrize("model_type", ["llama", "mamba2", "jamba"])
def test_another_architecture_is_refused(mamba, tmp_path, model_type):
    write_whole(mamba, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": model_type}))
    with pytest.raises(ValueError, match=f"model_type must be 'mamba' or.* got '{model_type}'"):
        load(tmp_path)


def test_a_path_to_nothing_or_to_a_file_is_refused(mamba, tmp_path):
    with pytest.raises(ValueError, match=r"there is no folder .*nowhere"):
        MambaLM.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"nowhere must be a folder, got nothing"):
        load(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"file must be a folder, got a file"):
        MambaLM.from_pretrained(tmp_path / "file")


def test_weights_of_two_kinds_in_one_folder_are_refused(tmp_path):
    model = MambaLM(MambaConfig(d_model=8, n_layer=1, vocab_size=8))
    save(model, tmp_path)
    with pytest.raises(ValueError, match=r"must hold no other weights, got model\.safetensors"):
        save(model, tmp_path, layout="mamba_ssm")
    save(model, tmp_path, layout="hf")
    assert load(tmp_path).config == model.config


def test_a_layout_that_cannot_hold_the_model_or_does_not_exist_is_refused(tmp_path):
    model = MambaLM(MambaConfig(d_model=8, n_layer=1, vocab_size=8, selection_norm_eps=1e-6))
    with pytest.raises(
        ValueError, match="layout 'mamba_ssm' cannot hold this model: selection_norm_eps"
    ):
        model.save_pretrained(tmp_path / "new", layout="mamba_ssm")
    with pytest.raises(ValueError, match="must be one of mambakit, hf, mamba_ssm, got 'gguf'"):
        model.save_pretrained(tmp_path / "new", layout="gguf")
    assert not (tmp_path / "new").exists()


def test_a_parameter_inside_a_larger_memory_is_written_alone(tmp_path):
    model = MambaLM(MambaConfig(d_model=8, n_layer=1, vocab_size=8))
    model.backbone.norm_f.weight.data = torch.ones(1_000_000)[:8]
    model.save_pretrained(tmp_path, layout="mamba_ssm")
    assert (tmp_path / "pytorch_model.bin").stat().st_size < 100_000
