"""Rules of the config."""

import dataclasses

import pytest

from mambakit import MambaConfig

SMALL = {"d_model": 40, "n_layer": 2, "vocab_size": 50}


def test_derived_sizes():
    config = MambaConfig(**SMALL)
    assert (config.d_inner, config.rank, config.padded_vocab_size) == (80, 3, 56)
    assert MambaConfig(**SMALL, dt_rank=7, expand=3).rank == 7
    assert MambaConfig(**SMALL, expand=3).d_inner == 120
    assert MambaConfig(**SMALL | {"vocab_size": 56}).padded_vocab_size == 56
    assert MambaConfig(**SMALL, pad_vocab_size_multiple=1).padded_vocab_size == 50


def test_it_is_a_value():
    config = MambaConfig(**SMALL)
    assert config == MambaConfig(**SMALL)
    assert hash(config) == hash(MambaConfig(**SMALL))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.d_model = 1


def test_a_dictionary_and_back():
    config = MambaConfig(**SMALL, dt_rank=5, tie_embeddings=False, norm_eps=1e-6)
    assert MambaConfig.from_dict(config.to_dict()) == config
    normed = dataclasses.replace(config, selection_norm_eps=1e-6)
    assert MambaConfig.from_dict(normed.to_dict()) == normed != config


def test_published_sizes_take_changes():
    config = MambaConfig.published("2.8b", n_layer=2)
    assert (config.d_model, config.n_layer, config.vocab_size) == (2560, 2, 50280)


@pytest.mark.refuses
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_model": 0}, "d_model must be a whole number of at least 1, got 0"),
        ({"n_layer": 2.0}, r"n_layer must be a whole number of at least 1, got 2\.0"),
        ({"vocab_size": True}, "vocab_size must be a whole number of at least 1, got True"),
        ({"d_state": 300}, "d_state must be at most 256, got 300"),
        ({"dt_rank": "many"}, 'dt_rank must be a whole number of at least 1 or "auto"'),
        ({"tie_embeddings": 1}, "tie_embeddings must be true or false, got 1"),
        ({"norm_eps": 0.0}, r"norm_eps must be a positive, finite number, got 0\.0"),
        (
            {"selection_norm_eps": 0},
            "selection_norm_eps must be a positive, finite number, got 0",
        ),
        ({"selection_norm_eps": "no"}, "selection_norm_eps must be a positive, finite number"),
        ({"norm_eps": None}, "norm_eps must be a positive, finite number, got None"),
        ({"dt_min": float("nan")}, "dt_min must be a positive, finite number, got nan"),
        ({"dt_max": float("inf")}, "dt_max must be a positive, finite number, got inf"),
        ({"d_model": 2**31}, r"d_model must be below 2\*\*31, got 2147483648"),
        ({"dt_min": 0.5}, r"dt_min must be at most dt_max=0\.1, got 0\.5"),
    ],
)
def test_a_broken_rule_names_its_attribute(changes, message):
    with pytest.raises(ValueError, match=f"MambaConfig: {message}"):
        MambaConfig(**SMALL | changes)


def test_an_unknown_key_is_refused_with_the_nearest_name():
    with pytest.raises(ValueError, match="there is no 'd_modle'; did you mean 'd_model'"):
        MambaConfig.from_dict(SMALL | {"d_modle": 3})
    with pytest.raises(ValueError, match=r"there is no 'zzz'$"):
        MambaConfig.from_dict(SMALL | {"zzz": 3})


def test_missing_sizes_are_named_together():
    with pytest.raises(ValueError, match="MambaConfig: n_layer, vocab_size must be given"):
        MambaConfig.from_dict({"d_model": 8})


def test_an_unknown_published_size_is_refused():
    with pytest.raises(ValueError, match=r"must be one of 130m, .*, got '7b'"):
        MambaConfig.published("7b")
