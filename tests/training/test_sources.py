"""Laws of models to use: wherever one lies, it comes with its own tokenizer or is refused."""

import pytest
import torch

from mambakit import MambaConfig, MambaLM
from mambakit.data import ByteTokenizer, CharacterTokenizer, save_tokenizer
from mambakit.evaluation import evaluate_files
from mambakit.training import convert_model, load_model, load_run, train


def make(vocab_size=256):
    torch.manual_seed(0)
    return MambaLM(MambaConfig(d_model=8, n_layer=1, vocab_size=vocab_size, d_state=2))


def words(path, end="<|end|>"):
    """Write a tokenizer of the ``tokenizers`` library, as published models have them."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=280,
        special_tokens=[end],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["to be or not to be, that is the question"] * 9, trainer)
    tokenizer.save(str(path))
    return tokenizer


def same(model, other):
    pairs = zip(model.state_dict().items(), other.state_dict().items(), strict=True)
    return all(name == other and torch.equal(a, b) for (name, a), (other, b) in pairs)


@pytest.mark.parametrize("layout", ["mambakit", "hf", "mamba_ssm"])
def test_a_converted_run_is_used_like_the_run(config, text, tmp_path, layout):
    train(config, tmp_path / "run", say=lambda line: None)
    convert_model(tmp_path / "run", tmp_path / "model", layout=layout)
    run, model = load_run(tmp_path / "run"), load_model(tmp_path / "model")
    assert same(model.model, run.model)
    assert not model.model.training
    assert evaluate_files(*model, [text]) == evaluate_files(run.model, run.tokenizer, [text])
    assert same(load_model(tmp_path / "run").model, run.model)


def test_the_tokenizer_beside_a_published_model_is_its_own(tmp_path):
    make(300).save_pretrained(tmp_path, layout="hf")
    theirs = words(tmp_path / "tokenizer.json")
    ids = load_model(tmp_path).tokenizer.encode("to be<|end|>").tolist()
    assert ids == theirs.encode("to be<|end|>").ids
    convert_model(tmp_path, tmp_path / "ours")
    assert load_model(tmp_path / "ours").tokenizer.encode("to be<|end|>").tolist() == ids


def test_a_model_on_the_hub_brings_its_tokenizer(tmp_path, monkeypatch):
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    repository, commit = tmp_path / "cache" / "models--owner--model", "0123456789" * 4
    make().save_pretrained(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    with pytest.raises(ValueError, match=r"owner/model must have a tokenizer\.json "):
        load_model("owner/model")
    save_tokenizer(ByteTokenizer(), repository / "snapshots" / commit / "tokenizer.json")
    model, tokenizer = load_model("owner/model")
    assert same(model, make())
    assert tokenizer.name == "byte"
    convert_model("owner/model", "new", revision="main", local_files_only=True)
    assert load_model("new").tokenizer.name == "byte"


def test_the_one_that_is_named_wins(tmp_path):
    make().save_pretrained(tmp_path)
    (tmp_path / "text.txt").write_text("to be")
    save_tokenizer(ByteTokenizer(), tmp_path / "tokenizer.json")
    words(tmp_path / "words.json")
    assert load_model(tmp_path).tokenizer.name == "byte"
    characters = load_model(tmp_path, f"character:{tmp_path}/text.txt").tokenizer
    assert characters.to_json() == CharacterTokenizer("to be").to_json()
    save_tokenizer(CharacterTokenizer("abc"), tmp_path / "abc.json")
    assert load_model(tmp_path, str(tmp_path / "abc.json")).tokenizer.vocab_size == 3
    assert load_model(tmp_path, "byte").tokenizer.name == "byte"


@pytest.mark.parametrize(
    ("tokenizer", "sentence"),
    [
        (None, "must have a tokenizer.json beside the model, got none: .* --tokenizer"),
        ("character", "must be given its alphabet, as character:FILE, got 'character'$"),
        ("character:nowhere.txt", "cannot read alphabet nowhere.txt"),
        ("byt", "did you mean byte"),
        ("nowhere.json", "cannot read tokenizer nowhere.json"),
        (
            "byte",
            r"must have at most 200 ids like the model .*, got 256: it is another model's$",
        ),
    ],
)
def test_what_is_no_tokenizer_of_the_model_is_refused(tmp_path, tokenizer, sentence):
    make(200).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=sentence):
        load_model(tmp_path, tokenizer)


def test_a_mistyped_name_asks_no_network(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mambakit.training.sources.locate", None)  # it is not called
    make().save_pretrained("runs/demo")
    with pytest.raises(ValueError, match=r"no dmeo in the folder runs; did you mean runs/demo"):
        load_model("runs/dmeo")
    with pytest.raises(ValueError, match=r"^load: there is no other in the folder runs$"):
        load_model("runs/other")
    with pytest.raises(ValueError, match=r"no dmeo in the folder runs; did you mean runs/demo"):
        convert_model("runs/dmeo", "new")


def test_a_tokenizer_of_another_model_is_not_left_beside_a_converted_one(tmp_path):
    make().save_pretrained(tmp_path / "bare")
    make().save_pretrained(tmp_path / "other")
    save_tokenizer(ByteTokenizer(), tmp_path / "other" / "tokenizer.json")
    before = {path: path.read_bytes() for path in (tmp_path / "other").iterdir()}
    with pytest.raises(ValueError, match=r"must hold no tokenizer\.json, for .*bare has none"):
        convert_model(tmp_path / "bare", tmp_path / "other")
    assert {path: path.read_bytes() for path in (tmp_path / "other").iterdir()} == before


def test_a_run_is_not_written_over(config, tmp_path):
    train(config, tmp_path / "run", say=lambda line: None)
    make().save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"run must be no run folder: choose another$"):
        convert_model(tmp_path / "model", tmp_path / "run")
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_another_tokenizer_helps_a_run_whose_own_is_damaged(config, tmp_path):
    train(config, tmp_path / "run", say=lambda line: None)
    (tmp_path / "run" / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer\.json must be JSON"):
        load_model(tmp_path / "run")
    save_tokenizer(CharacterTokenizer("ab"), tmp_path / "other.json")
    model, tokenizer = load_model(tmp_path / "run", str(tmp_path / "other.json"))
    assert (model.training, tokenizer.vocab_size) == (False, 2)


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json"])
def test_a_refused_conversion_leaves_the_model_that_was_there(tmp_path, name):
    make().save_pretrained(tmp_path / "new")
    save_tokenizer(ByteTokenizer(), tmp_path / "new" / "tokenizer.json")
    make().save_pretrained(tmp_path / "old")
    (tmp_path / "old" / name).unlink(missing_ok=True)
    (tmp_path / "old" / name).mkdir()
    weights = (tmp_path / "old" / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match=r"must be a file, got a folder$"):
        convert_model(tmp_path / "new", tmp_path / "old", dtype=torch.bfloat16)
    assert (tmp_path / "old" / "model.safetensors").read_bytes() == weights


def test_a_tokenizer_that_cannot_be_written_stops_the_weights(tmp_path, monkeypatch):
    make().save_pretrained(tmp_path / "new")
    save_tokenizer(ByteTokenizer(), tmp_path / "new" / "tokenizer.json")
    make().save_pretrained(tmp_path / "old")
    weights = (tmp_path / "old" / "model.safetensors").read_bytes()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(tmp_path), "write_text", full)
    with pytest.raises(RuntimeError, match="No space left on device"):
        convert_model(tmp_path / "new", tmp_path / "old", dtype=torch.bfloat16)
    assert (tmp_path / "old" / "model.safetensors").read_bytes() == weights


def test_a_tokenizer_link_that_leads_nowhere_is_not_taken_for_none(tmp_path):
    make().save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").symlink_to("nowhere.json")
    with pytest.raises(ValueError, match=r"cannot read tokenizer .*tokenizer\.json"):
        load_model(tmp_path)
    with pytest.raises(ValueError, match=r"cannot read tokenizer .*tokenizer\.json"):
        convert_model(tmp_path, tmp_path / "new")
