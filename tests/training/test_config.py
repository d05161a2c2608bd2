"""Laws of configs: they come back from TOML, and what is wrong in them is named."""

import tomllib
from pathlib import Path

import pytest

from mambakit.training import load_config, parse_config, train
from mambakit.training.config import config_tables, dump_config

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.toml"))


def test_a_config_comes_back_from_toml(tables, tmp_path):
    tables["training"]["betas"] = [0.8, 0.9]
    tables["training"]["clip"] = 1
    config = parse_config(tables)
    (tmp_path / "run.toml").write_text(dump_config(config))
    assert load_config(tmp_path / "run.toml") == config
    assert config.training.betas == (0.8, 0.9)
    assert isinstance(config.training.clip, float)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_the_recipes_are_runs(recipe):
    config = load_config(recipe)
    assert parse_config(config_tables(config)) == config


def test_there_are_recipes():
    assert [recipe.stem for recipe in RECIPES] == ["demo", "shakespeare"]


def test_overrides_win_and_are_toml_or_bare_words(tables, tmp_path):
    (tmp_path / "run.toml").write_text(dump_config(parse_config(tables)))
    config = load_config(
        tmp_path / "run.toml",
        [
            "training.learning_rate=1e-3",
            "training.compile=true",
            "data.files=some/where.txt",
            "tokenizer.kind = character",
            "report.prompt='a=b'",
            "model.dt_rank=auto",
        ],
    )
    assert config.training.learning_rate == 1e-3
    assert config.training.compile is True
    assert config.data.files == ("some/where.txt",)
    assert config.tokenizer.kind == "character"
    assert config.report.prompt == "a=b"
    assert config.model["dt_rank"] == "auto"


def test_an_override_of_minutes_takes_the_place_of_steps(tables, tmp_path):
    (tmp_path / "run.toml").write_text(dump_config(parse_config(tables)))
    config = load_config(tmp_path / "run.toml", ["training.minutes=2"])
    assert (config.training.steps, config.training.minutes) == (None, 2.0)


@pytest.mark.parametrize(
    ("table", "key", "value", "sentence"),
    [
        ("training", "lenght", 3, "training.lenght; did you mean training.length?"),
        ("model", "d_modle", 3, "model.d_modle; did you mean model.d_model?"),
        ("data", "xyz", 3, "got data.xyz: source, files"),
        ("training", "length", "long", "training.length must be a whole number, got 'long'"),
        ("training", "length", 1.5, "training.length must be a whole number, got 1.5"),
        ("training", "length", True, "training.length must be a whole number, got True"),
        ("training", "clip", "much", "training.clip must be a number, got 'much'"),
        ("training", "betas", [0.9], "training.betas must be a list of two numbers, got [0.9]"),
        ("training", "precision", "fp8", "must be 'auto' or 'fp32' or 'bf16', got 'fp8'"),
        ("training", "length", 0, "training.length must be at least 1, got 0"),
        ("training", "chunk", 0, "training.chunk must be at least 1, got 0"),
        ("training", "chunk", 5, "training.chunk must divide training.length 32, got 5"),
        ("training", "compile", 1, "training.compile must be true or false, got 1"),
        ("training", "clip", -1, "training.clip must be at least 0, got -1"),
        ("training", "warmup", 1.5, "training.warmup must lie in 0 to 1, got 1.5"),
        ("training", "betas", [0.9, 1], "training.betas must lie in 0 to 1"),
        ("training", "minutes", 3, "training must give one of steps and minutes"),
        ("training", "final_learning_rate", 1.0, "must be at most learning_rate"),
        ("model", "d_model", 0, "d_model must be a whole number of at least 1, got 0"),
        ("model", "d_model", "wide", "model.d_model must be a whole number, got 'wide'"),
        ("data", "validation", 1.0, "must be at least 0 and below 1 together"),
        ("data", "files", [], "data.files must name at least one file"),
        ("data", "source", "python-stdlib", "data.files must be absent with source"),
        ("training", "minutes", float("inf"), "training.minutes must be finite, got inf"),
        ("training", "learning_rate", float("inf"), "learning_rate must be finite, got inf"),
        ("training", "betas", [0.9, float("nan")], "training.betas must be finite"),
        ("model", "dt_max", float("inf"), "dt_max must be a positive, finite number, got inf"),
        ("report", "temperature", float("inf"), "report.temperature must be finite, got inf"),
        ("report", "top_p", 0, "report.top_p must be above 0 and at most 1"),
    ],
)
def test_what_is_wrong_is_named(tables, table, key, value, sentence):
    tables[table][key] = value
    with pytest.raises(ValueError) as refusal:
        parse_config(tables)
    assert sentence in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"trainning": {}}, "got trainning; did you mean training?"),
        ({"data": None}, r"the table \[data\] must be given"),
        ({"model": {"n_layer": 1}}, "model.d_model must be given, got nothing"),
        ({"data": 3}, "data must be a table, got 3"),
    ],
)
def test_tables_that_are_wrong_are_named(tables, change, sentence):
    tables = {k: v for k, v in {**tables, **change}.items() if v is not None}
    with pytest.raises(ValueError, match=sentence):
        parse_config(tables)


@pytest.mark.parametrize("assignment", ["steps=3", "training.steps", "=3", "training.=3"])
def test_an_override_that_is_none_is_refused(tables, tmp_path, assignment):
    (tmp_path / "run.toml").write_text(dump_config(parse_config(tables)))
    with pytest.raises(ValueError, match=r"an override must read table\.key=value"):
        load_config(tmp_path / "run.toml", [assignment])


def test_files_that_are_no_config_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"cannot read config .*none\.toml: No such file"):
        load_config(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("[data")
    with pytest.raises(ValueError, match=r"bad\.toml must be TOML"):
        load_config(tmp_path / "bad.toml")


def test_the_vocabulary_is_the_tokenizers_unless_it_is_given(tables):
    assert parse_config(tables).model_config(100).vocab_size == 100
    tables["model"]["vocab_size"] = 128
    assert parse_config(tables).model_config(100).vocab_size == 128
    with pytest.raises(ValueError, match="vocab_size must be at least 200, the tokenizer's"):
        parse_config(tables).model_config(200)


def test_toml_is_plain(config):
    assert set(tomllib.loads(dump_config(config))) == {
        "data", "tokenizer", "model", "training", "report",
    }  # fmt: skip


@pytest.mark.parametrize("table", ["training", "report"])
@pytest.mark.parametrize("seed", [-1, 2**63, int("9" * 40)])
def test_seeds_out_of_range_are_refused(tables, table, seed):
    tables[table]["seed"] = seed
    with pytest.raises(ValueError, match=rf"{table}\.seed must be at least 0 and below 2"):
        parse_config(tables)


def test_the_largest_seed_draws_weights_and_batches(tables, tmp_path):
    tables["training"] |= {"seed": 2**63 - 1, "steps": 1}
    train(parse_config(tables), tmp_path / "run", say=lambda line: None)
    assert load_config(tmp_path / "run" / "config.toml").training.seed == 2**63 - 1
