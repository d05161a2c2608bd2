"""Laws of the layouts: a config survives each, and what we cannot compute is refused."""

import json
from contextlib import suppress

import pytest
import torch
from hypothesis import given, strategies as st

from mambakit import MambaConfig
from mambakit.models.layouts import HF, LAYOUTS, MAMBA_SSM, recognise

# As published with the weights of state-spaces/mamba-130m and tiiuae/falcon-mamba-7b.
PUBLISHED_130M = {
    "d_model": 768, "n_layer": 24, "vocab_size": 50277, "ssm_cfg": {}, "rms_norm": True,
    "residual_in_fp32": True, "fused_add_norm": True, "pad_vocab_size_multiple": 8,
}  # fmt: skip
PUBLISHED_FALCON = {
    "_name_or_path": "./", "architectures": ["FalconMambaForCausalLM"], "bos_token_id": 0,
    "conv_kernel": 4, "eos_token_id": 11, "expand": 16, "hidden_act": "silu",
    "hidden_size": 4096, "initializer_range": 0.1, "intermediate_size": 8192,
    "layer_norm_epsilon": 1e-05, "model_type": "falcon_mamba", "num_hidden_layers": 64,
    "pad_token_id": 11, "rescale_prenorm_residual": False, "residual_in_fp32": True,
    "state_size": 16, "tie_word_embeddings": False, "time_step_floor": 0.0001,
    "time_step_init_scheme": "random", "time_step_max": 0.1, "time_step_min": 0.001,
    "time_step_rank": 256, "time_step_scale": 1.0, "torch_dtype": "bfloat16",
    "transformers_version": "4.43.0.dev0", "use_bias": False, "use_cache": True,
    "use_conv_bias": True, "vocab_size": 65024,
}  # fmt: skip
TINY_HF = {
    "model_type": "mamba",
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "vocab_size": 16,
}
TINY_SSM = {"d_model": 8, "n_layer": 1, "vocab_size": 16, "ssm_cfg": {}}

configs = st.builds(
    MambaConfig,
    d_model=st.integers(1, 70),
    n_layer=st.integers(1, 3),
    vocab_size=st.integers(1, 100),
    d_state=st.integers(1, 256),
    d_conv=st.integers(1, 5),
    expand=st.integers(1, 3),
    dt_rank=st.just("auto") | st.integers(6, 9),  # 1 to 5 may be what "auto" means
    pad_vocab_size_multiple=st.integers(1, 9),
    tie_embeddings=st.booleans(),
    residual_in_fp32=st.booleans(),
    bias=st.booleans(),
    conv_bias=st.booleans(),
    dt_min=st.sampled_from([1e-3, 1e-2]),
    dt_max=st.sampled_from([1e-1, 1.0]),
    dt_init_floor=st.sampled_from([1e-4, 1e-5]),
)
eps = st.sampled_from([1e-6, 1e-5, 1e-4])


def through(layout, config):
    """The config after it was written and read again, and the file's own keys."""
    values = json.loads(json.dumps(layout.write_config(config, torch.float32)))
    assert recognise(values) is layout
    return layout.read_config(values), values


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@given(config=configs)
def test_a_config_comes_back(layout, config):
    assert through(layout, config)[0] == config


@pytest.mark.parametrize("name", ["mambakit", "hf"])
@given(config=configs, norm_eps=eps, selection=eps)
def test_so_do_the_norms(name, config, norm_eps, selection):
    values = config.to_dict() | {"norm_eps": norm_eps, "selection_norm_eps": selection}
    config = MambaConfig.from_dict(values)
    assert through(LAYOUTS[name], config)[0] == config


def test_names_of_tensors_come_back():
    name = "backbone.embedding.weight"
    assert HF.their_name(name) == "backbone.embeddings.weight"
    assert HF.our_name(HF.their_name(name)) == HF.our_name(name) == name
    assert MAMBA_SSM.their_name(name) == name


def test_the_published_130m_is_the_published_size():
    assert recognise(PUBLISHED_130M) is MAMBA_SSM
    config = MAMBA_SSM.read_config(PUBLISHED_130M)
    assert config == MambaConfig.published("130m", vocab_size=50277)
    assert config.padded_vocab_size == 50280


def test_the_published_falcon_has_the_width_of_its_weights_and_not_of_its_expand():
    assert recognise(PUBLISHED_FALCON) is HF
    config = HF.read_config(PUBLISHED_FALCON)
    assert config.d_inner == 8192
    assert config.rank == 256
    assert config.selection_norm_eps == 1e-6
    assert not config.tie_embeddings


def test_transformers_configs_may_keep_keys_of_mamba_ssm():
    both = TINY_HF | {"ssm_cfg": {}, "rms_norm": True, "pad_vocab_size_multiple": 8}
    assert recognise(both) is HF
    assert HF.read_config(both).padded_vocab_size == 16


def test_what_transformers_reads_is_complete():
    values = through(HF, MambaConfig(24, 1, 13, dt_rank="auto", tie_embeddings=False))[1]
    assert values["vocab_size"] == 16
    assert values["time_step_rank"] == 2
    assert values["intermediate_size"] == 48
    assert values["torch_dtype"] == "float32"
    assert values["tie_word_embeddings"] is False
    assert values["eos_token_id"] is None


def test_only_what_differs_from_their_defaults_is_in_ssm_cfg():
    assert through(MAMBA_SSM, MambaConfig(8, 1, 16))[1]["ssm_cfg"] == {}
    changed = MambaConfig(8, 1, 16, d_state=4, conv_bias=False)
    assert through(MAMBA_SSM, changed)[1]["ssm_cfg"] == {"d_state": 4, "conv_bias": False}


@pytest.mark.refuses
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "llama"}, "model_type must be 'mamba' or 'falcon_mamba', got 'llama'"),
        ({"model_type": "mamba2"}, "model_type must be .*, got 'mamba2'"),
        ({"architectures": ["MambaModel"]}, "must hold a language model, got MambaModel"),
        ({"architectures": 5}, "^architectures must be a list of names, got 5$"),
        (
            {"architectures": "MambaForCausalLM"},
            "^architectures must be a list of names, got 'MambaForCausalLM'$",
        ),
        ({"architectures": [["MambaForCausalLM"]]}, r"must be a list of names, got \[\['Mamba"),
        ({"hidden_act": "gelu"}, "hidden_act must be 'silu' or 'swish', got 'gelu'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config must be None"),
        ({"intermediate_size": 12}, "must be a multiple of hidden_size=8, got 12"),
        ({"intermediate_size": None}, "must be a multiple of hidden_size=8, got None"),
        ({"hidden_size": "8"}, "d_model must be a whole number"),
        ({"state_size": 300}, "d_state must be at most 256, got 300"),
        ({"unpadded_vocab_size": 7}, "vocab_size must be 7, which"),
    ],
)
def test_foreign_transformers_configs_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        HF.read_config(TINY_HF | changes)


def test_transformers_sizes_must_be_given():
    with pytest.raises(ValueError, match="hidden_size, vocab_size must be given"):
        HF.read_config({"model_type": "mamba", "num_hidden_layers": 1})
    with pytest.raises(ValueError, match="model_type must be given"):
        HF.read_config({"architectures": ["MambaForCausalLM"]})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"attn_layer_idx": [3]}, r"attn_layer_idx must be \[\] or None, got \[3\]"),
        ({"d_intermediate": 64}, "d_intermediate must be 0, got 64"),
        ({"rms_norm": False}, "rms_norm must be True, got False"),
        ({"ssm_cfg": {"layer": "Mamba2"}}, "layer must be 'Mamba1', got 'Mamba2'"),
        (
            {"ssm_cfg": {"use_bcdt_rms": True, "headdim": 64}},
            "ssm_cfg has headdim, use_bcdt_rm",
        ),
        ({"ssm_cfg": 3}, "ssm_cfg must be an object, got 3"),
        ({"mlp": 1}, "the config has mlp, which no model"),
    ],
)
def test_foreign_mamba_ssm_configs_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        MAMBA_SSM.read_config(TINY_SSM | changes)


words_of_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2)
    ),
    max_leaves=4,
)


@pytest.mark.refuses
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@given(data=st.data(), value=words_of_json)
def test_whatever_a_key_says_is_read_or_refused(layout, data, value):
    falcon = {"selection_norm_eps": 1e-6} if layout is HF else {}
    values = layout.write_config(MambaConfig(8, 1, 16, **falcon), torch.float32)
    changed = values | {data.draw(st.sampled_from(sorted(values))): value}
    with suppress(ValueError):
        assert isinstance(layout.read_config(changed), MambaConfig)


@pytest.mark.parametrize("changes", [{"norm_eps": 1e-6}, {"selection_norm_eps": 1e-6}])
def test_mamba_ssm_has_no_words_for_other_norms(changes):
    name = next(iter(changes))
    with pytest.raises(ValueError, match=rf"{name} must be .*, got 1e-06"):
        MAMBA_SSM.write_config(MambaConfig(8, 1, 16, **changes), torch.float32)
