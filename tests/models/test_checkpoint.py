"""Laws of a model on disk: what is saved comes back, what is broken is named."""

import json
import resource

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from mambakit import MambaConfig, MambaLM
from mambakit.models import load, save

SIZES = {"d_model": 12, "n_layer": 2, "vocab_size": 21, "d_state": 4}
TOKENS = torch.arange(10)[None]


def make(dtype=None, **changes):
    torch.manual_seed(0)
    return MambaLM(MambaConfig(**SIZES | changes), dtype=dtype)


@pytest.fixture
def folder(tmp_path):
    save(make(), tmp_path)
    return tmp_path


def rewrite(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_model_comes_back_bit_for_bit(tmp_path, dtype, tie):
    model = make(dtype, tie_embeddings=tie)
    save(model, tmp_path / "new" / "folder")
    again = load(tmp_path / "new" / "folder")
    assert again.config == model.config
    for (name, parameter), (other, expected) in zip(
        again.named_parameters(), model.named_parameters(), strict=True
    ):
        assert name == other
        assert_close(parameter, expected, rtol=0, atol=0, msg=name)
        assert parameter.requires_grad
        assert getattr(parameter, "_no_weight_decay", False) == getattr(
            expected, "_no_weight_decay", False
        )
    assert (again.lm_head.weight is again.backbone.embedding.weight) == tie
    assert_close(again(TOKENS).logits, model(TOKENS).logits, rtol=0, atol=0)


def test_a_tied_matrix_is_stored_once(folder):
    names = load_file(folder / "model.safetensors").keys()
    assert "backbone.embedding.weight" in names
    assert "lm_head.weight" not in names


def test_the_config_beside_it_can_be_read_by_people(folder):
    assert json.loads((folder / "config.json").read_text())["d_model"] == 12


def test_loading_may_convert_and_keeps_decay_and_step_in_float32(folder):
    model = load(folder, dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        wide = name.endswith(("A_log", ".D", "dt_proj.bias"))
        assert parameter.dtype == (torch.float32 if wide else torch.bfloat16), name
    assert_close(
        model.backbone.layers[0].mixer.A_log,
        make().backbone.layers[0].mixer.A_log,
        atol=0,
        rtol=0,
    )


def test_short_decays_in_a_file_become_float32(folder):
    rewrite(folder, lambda tensors: tensors.update({k: v.half() for k, v in tensors.items()}))
    model = load(folder)
    assert model.backbone.layers[0].mixer.A_log.dtype == torch.float32
    assert model.backbone.layers[0].mixer.in_proj.weight.dtype == torch.float16
    assert model.backbone.layers[0].mixer.A_log._no_weight_decay


def test_the_loaded_model_does_not_hang_on_the_file(folder):
    model = load(folder)
    before = model(TOKENS).logits
    with (folder / "model.safetensors").open("r+b") as file:
        file.write(b"\xff" * 5000)
    assert_close(model(TOKENS).logits, before, rtol=0, atol=0)


def test_a_second_save_replaces_the_first(folder):
    other = make(n_layer=1)
    save(other, folder)
    assert load(folder).config.n_layer == 1
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "model.safetensors",
    ]


def test_names_and_shapes_that_do_not_fit_are_listed_together(folder):
    def change(tensors):
        tensors["backbone.norm_g.weight"] = tensors.pop("backbone.norm_f.weight")
        tensors["backbone.layers.0.mixer.D"] = torch.ones(5)
        del tensors["backbone.layers.1.mixer.x_proj.weight"]

    rewrite(folder, change)
    with pytest.raises(ValueError, match="does not fit the config beside it") as caught:
        load(folder)
    message = str(caught.value)
    assert "missing: backbone.layers.1.mixer.x_proj.weight, backbone.norm_f.weight;" in message
    assert "unexpected: backbone.norm_g.weight;" in message
    assert "of another shape: backbone.layers.0.mixer.D (5,) instead of (24,)" in message
    assert "\n" not in message


def test_another_sizes_checkpoint_is_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"d_model": 16, "n_layer": 30}))
    with pytest.raises(
        ValueError, match=r"missing: .* and \d+ more; of another shape: "
    ) as caught:
        load(folder)
    assert len(str(caught.value)) < 5000


def test_whole_numbers_for_weights_are_refused(folder):
    rewrite(folder, lambda t: t.update({"backbone.norm_f.weight": torch.ones(12).int()}))
    with pytest.raises(
        ValueError, match=r"of a dtype that weights cannot have: .*norm_f\.weight int32$"
    ):
        load(folder)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_file_is_refused(folder, share):
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(
        ValueError, match="whole safetensors file, but it is truncated or damaged"
    ):
        load(folder)


def test_a_damaged_header_is_refused(folder):
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[8:40] = b"\x00" * 32
    path.write_bytes(data)
    with pytest.raises(
        ValueError, match="whole safetensors file, but it is truncated or damaged"
    ):
        load(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(ValueError, match=str(folder / name)):
        load(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "must be JSON, got .* at line 1"),
        ("[]", "must be a JSON object, got list"),
        ('{"d_modle": 3}', "is not a config of this model: .*did you mean 'd_model'"),
        ('{"d_model": 3}', "n_layer, vocab_size must be given"),
    ],
)
def test_a_config_that_is_none_is_refused(folder, text, message):
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        load(folder)


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RuntimeError, match=r"cannot write .*config\.json"):
        save(make(), tmp_path / "file" / "folder")


def test_a_full_disk_leaves_what_was_there(folder):
    model = make(n_layer=3)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, hard))
    try:
        with pytest.raises(RuntimeError, match=r"cannot write .*model\.safetensors"):
            save(model, folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    expected = dict(make().named_parameters())
    for name, parameter in load(folder).named_parameters():
        assert_close(parameter, expected[name], rtol=0, atol=0)
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
