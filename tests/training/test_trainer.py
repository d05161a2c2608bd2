"""Laws of a run: it learns, it can be cut anywhere, and nothing saved is ever lost."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from mambakit import MambaConfig
from mambakit.data import PackedBatches
from mambakit.models import MambaLM
from mambakit.ops import _backends
from mambakit.training import Interrupted, load_run, parse_config, resume, train, trainer
from mambakit.training.config import dump_config, load_config
from mambakit.training.resume import checkpoint_folder, checkpoint_steps, read_run_state
from mambakit.training.run_folder import read_metrics

TIMES = ("seconds", "tokens_per_second")


def quiet(line):
    pass


def losses(folder):
    """The metrics without what a clock has measured."""
    return [{k: v for k, v in row.items() if k not in TIMES} for row in read_metrics(folder)]


def saved(folder, step):
    """All tensors and numbers of a checkpoint, without what a clock has measured."""
    checkpoint = checkpoint_folder(folder, step)
    tensors = {}
    for name in ("model.safetensors", "training.safetensors"):
        tensors |= load_file(checkpoint / name)
    record = json.loads((checkpoint / "training.json").read_text())
    return tensors, {k: v for k, v in record.items() if k not in TIMES}


def assert_equal_runs(one, other):
    assert checkpoint_steps(one) == checkpoint_steps(other)
    last = checkpoint_steps(one)[-1]
    tensors, record = saved(one, last)
    others, other_record = saved(other, last)
    assert record == other_record
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, others[name]), name
    assert losses(one) == losses(other)


def interrupt_after(monkeypatch, step, number=signal.SIGINT):
    """Send this process a signal in the middle of update ``step``, counted from 1."""
    original = trainer.Learner.step
    made = 0

    def step_and_interrupt(self, rate):
        nonlocal made
        made += 1
        if made == step:
            signal.raise_signal(number)
        return original(self, rate)

    monkeypatch.setattr(trainer.Learner, "step", step_and_interrupt)


def with_training(config, **changes):
    return replace(config, training=replace(config.training, **changes))


@pytest.fixture
def documents(tables, tmp_path):
    """A run over lines, each a document that is read from no state."""
    lines = (tmp_path / "text.txt").read_text().split("\n")
    folder = tmp_path / "lines"
    folder.mkdir()
    for i, line in enumerate(lines[:150]):
        (folder / f"{i:03}.txt").write_text(line)
    tables["data"] |= {"files": [str(folder)], "separator": "\n"}
    tables["training"]["reset_at_documents"] = True
    return parse_config(tables)


def test_a_run_learns_and_writes_its_folder(tables, tmp_path):
    tables["training"] |= {"steps": 40, "learning_rate": 1e-2}
    folder, said = tmp_path / "run", []
    result = train(parse_config(tables), folder, say=said.append)
    rows = read_metrics(folder)
    trained = [row for row in rows if row["kind"] == "train"]
    validated = [row for row in rows if row["kind"] == "validation"]
    assert [row["step"] for row in trained] == list(range(2, 41, 2))
    assert [row["step"] for row in validated] == list(range(5, 41, 5))
    assert trained[-1]["loss"] < trained[0]["loss"] - 1
    assert result.best_loss == min(row["loss"] for row in validated)
    assert result.steps == 40
    assert {"config.toml", "tokenizer.json", "metrics.jsonl", "checkpoints"} <= {
        path.name for path in folder.iterdir()
    }
    assert any("fp32" in line and "kernels" in line for line in said)
    assert list(folder.rglob("*.tmp")) == []


@pytest.mark.parametrize(
    ("why_not_cuda", "why_not_triton", "line"),
    [
        (None, None, "fused kernels"),
        (
            "install a compiler",
            None,
            (
                "Triton's kernels for the scan and plain PyTorch for the rest, "
                "slower than the CUDA kernels (install a compiler)"
            ),
        ),
        ("it is old", "too old", "plain PyTorch kernels (it is old; too old)"),
    ],
)
def test_the_kernels_of_a_gpu_are_named(monkeypatch, why_not_cuda, why_not_triton, line):
    monkeypatch.setattr(_backends, "_why_not_cuda", lambda index: why_not_cuda)
    monkeypatch.setattr(_backends, "_why_not_triton", lambda kind, index: why_not_triton)
    machine = trainer.Machine(torch.device("cuda", 0), None, "as asked")
    assert trainer._kernels(machine) == line


def test_the_picture_is_drawn_where_matplotlib_is(config, tmp_path):
    pytest.importorskip("matplotlib")
    train(config, tmp_path / "run", say=quiet)
    assert (tmp_path / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_run_says_so_at_the_start(config, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    said = []
    train(config, tmp_path / "run", say=said.append)
    assert any("pip install 'mambakit[plot]'" in line for line in said[:4])
    assert not (tmp_path / "run" / "loss.png").exists()


def test_the_same_config_gives_the_same_run(config, tmp_path):
    for name in ("one", "two"):
        train(config, tmp_path / name, say=quiet)
    assert_equal_runs(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize("batches", ["packed", "continuing"])
@pytest.mark.parametrize("stop", [1, 5, 7, 12])
def test_interrupted_and_resumed_is_uninterrupted(config, tmp_path, monkeypatch, batches, stop):
    config = with_training(config, batches=batches, accumulate=2)
    train(config, tmp_path / "whole", say=quiet)
    with monkeypatch.context() as patch:
        interrupt_after(patch, stop)
        said = []
        with pytest.raises(Interrupted):
            train(config, tmp_path / "cut", say=said.append)
    assert checkpoint_steps(tmp_path / "cut")[-1] == stop
    command = f"mambakit train {tmp_path}/cut/config.toml --out {tmp_path}/cut --resume"
    assert command in said[-1]
    torch.manual_seed(999)  # another process starts with other random numbers
    train(config, tmp_path / "cut", resume=True, say=quiet)
    assert_equal_runs(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize(("batches", "chunk"), [("packed", None), ("continuing", 8)])
def test_runs_that_reset_at_documents_resume_too(
    documents, tmp_path, monkeypatch, batches, chunk
):
    config = with_training(documents, batches=batches, chunk=chunk, accumulate=2)
    train(config, tmp_path / "whole", say=quiet)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 7)
        with pytest.raises(Interrupted):
            train(config, tmp_path / "cut", say=quiet)
    torch.manual_seed(999)
    train(config, tmp_path / "cut", resume=True, say=quiet)
    assert_equal_runs(tmp_path / "whole", tmp_path / "cut")


def test_resetting_at_documents_is_another_run(documents, tmp_path):
    train(documents, tmp_path / "apart", say=quiet)
    train(with_training(documents, reset_at_documents=False), tmp_path / "one", say=quiet)
    for one, other in zip(losses(tmp_path / "apart"), losses(tmp_path / "one"), strict=True):
        assert one["loss"] != other["loss"]
    with pytest.raises(ValueError, match="reset_at_documents must stay True to resume"):
        train(
            with_training(documents, reset_at_documents=False),
            tmp_path / "apart",
            resume=True,
            say=quiet,
        )


def test_batches_of_fewer_targets_weigh_less(documents, monkeypatch):
    """The gradient of an update is that of the mean over all targets of its batches."""
    training = documents.training
    tokens = np.arange(200) % 50
    ends = np.array([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 80, 200])
    machine = trainer.Machine(torch.device("cpu"), None, "as asked")
    gradients = []
    for batch_size, accumulate in ((1, 6), (6, 1)):
        torch.manual_seed(0)
        model = MambaLM(MambaConfig(d_model=8, n_layer=1, vocab_size=50))
        learner = trainer.Learner(
            model,
            PackedBatches(tokens, batch_size=batch_size, length=32, seed=0, documents=ends),
            replace(training, batch_size=batch_size, accumulate=accumulate),
            machine,
        )
        monkeypatch.setattr(learner.optimizer, "zero_grad", lambda set_to_none: None)
        loss, norm = learner.step(0.0).tolist()
        gradients.append((loss, norm, [p.grad for p in model.parameters()]))
    torch.testing.assert_close(*gradients)


def test_continuing_batches_carry_their_state(config, tmp_path):
    train(with_training(config, batches="continuing"), tmp_path / "run", say=quiet)
    tensors, _ = saved(tmp_path / "run", 12)
    assert tensors["state.0.ssm"].shape == (2, 32, 4)
    assert tensors["state.1.conv"].abs().sum() > 0


def test_sigterm_is_an_interrupt_too(config, tmp_path, monkeypatch):
    interrupt_after(monkeypatch, 3, signal.SIGTERM)
    with pytest.raises(Interrupted):
        train(config, tmp_path / "run", say=quiet)
    assert checkpoint_steps(tmp_path / "run") == [3]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_second_interrupt_stops_at_once_and_loses_nothing(config, tmp_path, monkeypatch):
    original = trainer.Learner.step

    def step(self, rate):
        if trainer.checkpoint_steps(tmp_path / "run"):
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return original(self, rate)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Learner, "step", step)
        with pytest.raises(KeyboardInterrupt) as stop:
            train(config, tmp_path / "run", say=quiet)
    assert not isinstance(stop.value, Interrupted)
    assert checkpoint_steps(tmp_path / "run") == [5]
    train(config, tmp_path / "run", resume=True, say=quiet)
    train(config, tmp_path / "whole", say=quiet)
    assert_equal_runs(tmp_path / "whole", tmp_path / "run")


_CHILD = """
import sys
from pathlib import Path
import torch
from mambakit.training import load_config, train
torch.set_num_threads(int(sys.argv[3]))
train(load_config(Path(sys.argv[1])), Path(sys.argv[2]))
"""


def test_killed_between_checkpoints_and_resumed_is_uninterrupted(config, tmp_path):
    config = with_training(config, steps=4000, evaluate_every=4, log_every=1)
    (tmp_path / "run.toml").write_text(dump_config(config))
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    threads = str(torch.get_num_threads())
    child = subprocess.Popen(
        [sys.executable, "-c", _CHILD, tmp_path / "run.toml", killed, threads],
        stdout=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 120
        while len(checkpoint_steps(killed)) < 2 and time.monotonic() < deadline:
            assert child.poll() is None
            time.sleep(0.01)
    finally:
        child.kill()
        child.wait()
    reached = checkpoint_steps(killed)[-1]
    # the run is long, so that the kill finds it running: both are stopped 7 steps further on
    for folder, again, steps in ((killed, True, 7), (whole, False, reached + 7)):
        with pytest.MonkeyPatch.context() as patch:
            interrupt_after(patch, steps)
            with pytest.raises(Interrupted):
                train(config, folder, resume=again, say=quiet)
    assert_equal_runs(killed, whole)
    assert list(killed.rglob("*.tmp")) == []


def test_a_finished_run_resumes_to_nothing(config, tmp_path):
    first = train(config, tmp_path / "run", say=quiet)
    before = losses(tmp_path / "run")
    again = train(config, tmp_path / "run", resume=True, say=quiet)
    assert (again.steps, again.best_loss) == (first.steps, first.best_loss)
    assert losses(tmp_path / "run") == before


def test_a_resume_before_the_first_checkpoint_starts(config, tmp_path, monkeypatch):
    def fail(self, rate):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Learner, "step", fail)
        with pytest.raises(KeyboardInterrupt):
            train(config, tmp_path / "run", say=quiet)
    train(config, tmp_path / "run", resume=True, say=quiet)
    train(config, tmp_path / "whole", say=quiet)
    assert_equal_runs(tmp_path / "whole", tmp_path / "run")


def test_only_the_last_and_the_best_checkpoint_are_kept(tables, tmp_path):
    tables["training"] |= {"learning_rate": 0.0, "final_learning_rate": 0.0}
    train(parse_config(tables), tmp_path / "run", say=quiet)
    # nothing is learnt, so the first validation stays the best
    assert checkpoint_steps(tmp_path / "run") == [5, 12]
    assert load_run(tmp_path / "run").step == 5
    assert load_run(tmp_path / "run", which="last").step == 12


def test_further_checkpoints_are_saved_between_validations(tables, tmp_path, monkeypatch):
    tables["training"] |= {"checkpoint_every": 2}
    seen = []
    original = trainer.save_checkpoint

    def save(folder, run, *rest):
        seen.append(run.step)
        original(folder, run, *rest)

    monkeypatch.setattr(trainer, "save_checkpoint", save)
    train(parse_config(tables), tmp_path / "run", say=quiet)
    assert seen == [2, 4, 5, 6, 8, 10, 12]


def test_a_loaded_run_is_what_was_trained(config, tmp_path):
    train(config, tmp_path / "run", say=quiet)
    run = load_run(tmp_path / "run")
    assert isinstance(run.model, MambaLM)
    assert run.tokenizer.name == "byte"
    assert run.config.model == config.model
    weights = load_file(checkpoint_folder(tmp_path / "run", run.step) / "model.safetensors")
    for name, parameter in run.model.named_parameters():
        assert torch.equal(parameter, weights[name])


def test_a_character_run_reads_its_own_tokenizer(tables, tmp_path, text):
    tables["tokenizer"] = {"kind": "character"}
    train(parse_config(tables), tmp_path / "run", say=quiet)
    run = load_run(tmp_path / "run")
    assert run.tokenizer.vocab_size == len(set(text.read_text()))
    assert run.model.config.vocab_size == run.tokenizer.vocab_size


@pytest.mark.parametrize("batches", ["packed", "continuing"])
def test_bf16_trains(tables, tmp_path, batches):
    tables["training"] |= {"precision": "bf16", "batches": batches, "steps": 6}
    result = train(parse_config(tables), tmp_path / "run", say=quiet)
    assert result.best_loss < 5.6
    weights = load_file(checkpoint_folder(tmp_path / "run", 6) / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


def test_without_validation_the_last_checkpoint_is_the_best(tables, tmp_path):
    tables["data"] |= {"validation": 0.0, "test": 0.0}
    result = train(parse_config(tables), tmp_path / "run", say=quiet)
    assert result.best_step == 0
    assert load_run(tmp_path / "run").step == 12


def test_accumulated_batches_are_one_large_batch(tables, tmp_path):
    tables["training"] |= {"steps": 3, "warmup": 0.0, "log_every": 1}
    first = {}
    for name, rows, times in (("large", 4, 1), ("small", 2, 2)):
        tables["training"] |= {"batch_size": rows, "accumulate": times}
        train(parse_config(tables), tmp_path / name, say=quiet)
        first[name] = [row for row in read_metrics(tmp_path / name) if row["kind"] == "train"]
    for large, small in zip(first["large"], first["small"], strict=True):
        assert large["loss"] == pytest.approx(small["loss"], rel=1e-4)
        assert large["gradient_norm"] == pytest.approx(small["gradient_norm"], rel=1e-3)


def test_minutes_become_steps_and_the_run_resumes_with_them(tables, tmp_path, monkeypatch):
    del tables["training"]["steps"], tables["training"]["evaluate_every"]
    tables["training"]["minutes"] = 0.003
    config = parse_config(tables)
    monkeypatch.setattr(trainer, "_steps_in", lambda *_: 9)
    train(config, tmp_path / "run", say=quiet)
    assert load_config(tmp_path / "run" / "config.toml").training.steps == 9
    assert train(config, tmp_path / "run", resume=True, say=quiet).steps == 9


def test_timing_finds_at_least_one_step(tables, tmp_path):
    del tables["training"]["steps"]
    tables["training"] |= {"minutes": 1e-6}
    assert train(parse_config(tables), tmp_path / "run", say=quiet).steps == 1


def test_a_loss_that_is_not_finite_stops_the_run(config, tmp_path, monkeypatch):
    original = trainer.Learner.step

    def step(self, rate):
        numbers = original(self, rate)
        self.made = getattr(self, "made", 0) + 1
        return numbers * (torch.nan if self.made == 8 else 1)

    monkeypatch.setattr(trainer.Learner, "step", step)
    with pytest.raises(
        RuntimeError, match=r"the loss must be finite, got nan at step 8 \(chec"
    ) as stop:
        train(config, tmp_path / "run", say=quiet)
    assert "\n" not in str(stop.value)
    assert checkpoint_steps(tmp_path / "run") == [5]


def test_a_run_folder_that_exists_is_refused(config, tmp_path):
    train(config, tmp_path / "run", say=quiet)
    before = losses(tmp_path / "run")
    with pytest.raises(ValueError, match="continue it with --resume or choose another"):
        train(config, tmp_path / "run", say=quiet)
    assert losses(tmp_path / "run") == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "diary.txt").write_text("mine")
    with pytest.raises(ValueError, match="got one that exists: choose another"):
        train(config, tmp_path / "other", say=quiet)


def test_a_folder_that_cannot_be_written_is_refused_at_once(config, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RuntimeError, match=r"cannot write .*file/run"):
        train(config, tmp_path / "file" / "run", say=quiet)


@pytest.mark.parametrize(
    ("table", "changes", "sentence"),
    [
        ("training", {"length": 20_000}, r"the train text must hold 2 windows"),
        ("data", {"files": ["nowhere.txt"]}, "there is no file or folder .*nowhere.txt"),
        ("tokenizer", {"kind": "nowhere.json"}, "cannot read tokenizer .*nowhere.json"),
    ],
)
def test_a_run_that_cannot_start_leaves_no_folder(tables, tmp_path, table, changes, sentence):
    tables[table] = tables.get(table, {}) | changes
    with pytest.raises(ValueError, match=sentence):
        train(parse_config(tables), tmp_path / "run", say=quiet)
    assert not (tmp_path / "run").exists()


def test_a_text_that_is_not_utf8_is_named(tables, tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"x" * 3000 + b"\xff" + b"x" * 3000)
    tables["data"]["files"] = [str(tmp_path / "bad.txt")]
    tables["tokenizer"] = {"kind": "character"}
    with pytest.raises(ValueError, match=r"bad\.txt must be UTF-8.* 0xff at offset 3000"):
        train(parse_config(tables), tmp_path / "run", say=quiet)


def test_a_full_disk_stops_the_run_and_keeps_the_last_checkpoint(config, tmp_path, monkeypatch):
    train(config, tmp_path / "whole", say=quiet)
    original = resume.save_file

    def save_file(tensors, path):
        if checkpoint_steps(tmp_path / "run"):
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        original(tensors, path)

    with monkeypatch.context() as patch:
        patch.setattr(resume, "save_file", save_file)
        sentence = r"cannot write .*step-00000010: .*No space left on device"
        with pytest.raises(RuntimeError, match=sentence):
            train(config, tmp_path / "run", say=quiet)
    assert checkpoint_steps(tmp_path / "run") == [5]
    assert list((tmp_path / "run").rglob("*.tmp")) == []
    train(config, tmp_path / "run", resume=True, say=quiet)
    assert_equal_runs(tmp_path / "whole", tmp_path / "run")


def test_resuming_another_config_is_refused(config, tmp_path):
    train(config, tmp_path / "run", say=quiet)
    with pytest.raises(ValueError, match=r"training\.steps must stay 12 to resume.*, got 99"):
        train(with_training(config, steps=99), tmp_path / "run", resume=True, say=quiet)


def test_resuming_with_another_text_is_refused(config, tmp_path, text):
    train(config, tmp_path / "run", say=quiet)
    text.write_text(text.read_text().replace("text", "TEXT"))
    with pytest.raises(ValueError, match="its files or its tokenizer have changed"):
        train(config, tmp_path / "run", resume=True, say=quiet)


def test_resuming_with_another_validation_text_is_refused(config, tmp_path, text):
    train(config, tmp_path / "run", say=quiet)
    data = bytearray(text.read_bytes())
    data[int(0.85 * len(data))] ^= 1
    text.write_bytes(data)
    with pytest.raises(ValueError, match="the validation text must be the one that the run"):
        train(config, tmp_path / "run", resume=True, say=quiet)


def test_a_validation_text_of_one_token_is_refused_before_training(tables, text, tmp_path):
    tables["data"] |= {"validation": 0.5 / text.stat().st_size, "test": 0.0}
    with pytest.raises(ValueError, match="the validation part must hold at least 2 tokens"):
        train(parse_config(tables), tmp_path / "run", say=quiet)


def test_a_start_that_was_killed_before_its_config_does_not_block_the_folder(config, tmp_path):
    train(config, tmp_path / "whole", say=quiet)
    train(config, tmp_path / "cut", say=quiet)
    for entry in (tmp_path / "cut").iterdir():
        if entry.name not in ("tokens", "tokenizer.json"):
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    train(config, tmp_path / "cut", say=quiet)
    assert_equal_runs(tmp_path / "whole", tmp_path / "cut")


def test_resuming_nothing_is_refused(config, tmp_path):
    with pytest.raises(ValueError, match="must hold a run to resume"):
        train(config, tmp_path / "run", resume=True, say=quiet)


@pytest.mark.parametrize("name", ["training.safetensors", "training.json", "model.safetensors"])
def test_a_damaged_checkpoint_is_refused(config, tmp_path, name):
    train(config, tmp_path / "run", say=quiet)
    path = checkpoint_folder(tmp_path / "run", 12) / name
    path.write_bytes(path.read_bytes()[: os.path.getsize(path) // 2])
    with pytest.raises(ValueError, match=name.replace(".", r"\.")) as refusal:
        train(config, tmp_path / "run", resume=True, say=quiet)
    assert "whole" in str(refusal.value)


@pytest.mark.parametrize("name", ["training.safetensors", "model.safetensors"])
def test_one_changed_bit_of_a_tensor_is_found(config, tmp_path, name):
    train(config, tmp_path / "run", say=quiet)
    path = checkpoint_folder(tmp_path / "run", 12) / name
    content = bytearray(path.read_bytes())
    content[-500] ^= 1
    path.write_bytes(content)
    with pytest.raises(
        ValueError, match=r"must be as it was written, got one that was changed$"
    ):
        train(config, tmp_path / "run", resume=True, say=quiet)
    if name == "model.safetensors":
        with pytest.raises(ValueError, match=r"must be as it was written"):
            load_run(tmp_path / "run", which="last")


def test_a_checkpoint_of_wrong_numbers_is_refused(config, tmp_path):
    train(config, tmp_path / "run", say=quiet)
    path = checkpoint_folder(tmp_path / "run", 12) / "training.json"
    record = json.loads(path.read_text())
    changes = (
        {"batches": {}},
        {"batches": {"epoch": 0, "position": 10**9}},
        {"batches": {"epoch": -1, "position": 0}},
        {"step": "12"},
        {"recent": None},
        {"colour": "red"},
    )
    less = {name: value for name, value in record.items() if name != "batches"}
    for wrong in ({}, [], less, *(record | change for change in changes)):
        path.write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match=r"training\.json must be a whole") as refusal:
            train(config, tmp_path / "run", resume=True, say=quiet)
        assert "\n" not in str(refusal.value)


def test_a_checkpoint_without_all_its_tensors_is_refused(config, tmp_path):
    config = with_training(config, batches="continuing")
    train(config, tmp_path / "run", say=quiet)
    path = checkpoint_folder(tmp_path / "run", 12) / "training.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    for name in ("random.cpu", "state.1.conv", "optimizer.backbone.norm_f.weight.step"):
        save_file({k: v for k, v in tensors.items() if k != name}, path)
        lacks = rf"training\.safetensors must be a whole .*{name.removeprefix('optimizer.')}"
        with pytest.raises(ValueError, match=lacks):
            train(config, tmp_path / "run", resume=True, say=quiet)
    save_file(tensors | {"random.cpu": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match=r"must be a whole .* got: random\.cpu must be"):
        train(config, tmp_path / "run", resume=True, say=quiet)


def test_a_damaged_line_of_the_metrics_is_named(config, tmp_path):
    train(config, tmp_path / "run", say=quiet)
    path = tmp_path / "run" / "metrics.jsonl"
    first, *rest = path.read_text().splitlines(keepends=True)
    for line in ("garbage", "[]", "{}", '{"kind": "tea", "step": 1}'):
        path.write_text("".join([first, line + "\n", *rest]))
        with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2, must") as refusal:
            train(config, tmp_path / "run", resume=True, say=quiet)
        assert "\n" not in str(refusal.value)


def test_a_last_line_cut_short_is_not_read(config, tmp_path):
    train(config, tmp_path / "run", say=quiet)
    rows = read_metrics(tmp_path / "run")
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "tra')
    assert read_metrics(tmp_path / "run") == rows


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [("config.toml", "must be a run folder"), ("checkpoints", "must have a checkpoint")],
)
def test_a_folder_that_is_no_run_is_refused(config, tmp_path, damage, sentence):
    train(config, tmp_path / "run", say=quiet)
    (tmp_path / "run" / damage).rename(tmp_path / "gone")
    with pytest.raises(ValueError, match=sentence):
        load_run(tmp_path / "run")


def test_the_time_of_a_run_adds_up_over_its_processes(config, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_after(patch, 4)
        with pytest.raises(Interrupted):
            train(config, tmp_path / "run", say=quiet)
    before = read_run_state(checkpoint_folder(tmp_path / "run", 4)).seconds
    assert train(config, tmp_path / "run", resume=True, say=quiet).seconds > before > 0


@pytest.mark.parametrize(
    ("table", "changes", "sentence"),
    [
        ("report", {"prompt": "\u20ac"}, "report.prompt must be text that the tokenizer reads"),
        ("model", {"expand": 2**30}, "a model of d_model 16 and n_layer 2 needs more memory"),
        ("data", {"files": ["~nobody-here/x"]}, "must begin with a home folder"),
        ("data", {"validation": 1e-5}, "data: the validation part must hold"),
        ("training", {"batch_size": 10**6}, "must hold 1000000 windows of length 32"),
    ],
)
def test_what_cannot_be_trained_leaves_no_run(tables, tmp_path, table, changes, sentence):
    tables["tokenizer"] = {"kind": "character"}
    tables[table] |= changes
    with pytest.raises((ValueError, RuntimeError), match=sentence):
        train(parse_config(tables), tmp_path / "run", say=quiet)
    assert not (tmp_path / "run").exists()


def test_a_step_beyond_the_end_of_the_run_is_refused(config, tmp_path):
    train(config, tmp_path / "run", say=quiet)
    path = checkpoint_folder(tmp_path / "run", 12) / "training.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"step": 99}))
    with pytest.raises(ValueError, match=r"must have a step of at most 12, .* got 99"):
        train(config, tmp_path / "run", resume=True, say=quiet)


def test_a_matplotlib_that_cannot_be_imported_is_left_out(config, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    said = []
    train(config, tmp_path / "run", say=said.append)
    assert any("matplotlib cannot be imported" in line for line in said[:4])


def one_step(config, tmp_path, **changes):
    """Loss, gradient norm and weights after one update, and the state that it leaves."""
    config = with_training(config, steps=1, learning_rate=1e-2, **changes)
    corpus = trainer.prepare_corpus(config.data, config.tokenizer, tmp_path)
    machine = trainer.resolve_machine("cpu", config.training.precision)
    learner = trainer.Learner(
        trainer._make_model(config, corpus, machine),
        trainer.make_batches(config.training, corpus.train),
        config.training,
        machine,
    )
    numbers = learner.step(1e-2)
    return numbers, learner.model.state_dict(), learner.state


@pytest.mark.parametrize("batches", ["packed", "continuing"])
def test_chunks_change_what_is_in_memory_and_nothing_else(config, tmp_path, batches):
    changes = {"batches": batches, "accumulate": 2}
    numbers, weights, state = one_step(config, tmp_path, **changes)
    others = one_step(config, tmp_path, **changes, chunk=8)
    torch.testing.assert_close(others[0], numbers)
    # AdamW's first step is the gradient's sign times the rate, where there is any gradient
    torch.testing.assert_close(others[1], weights, rtol=1e-3, atol=1e-4)
    assert (state is None) is (others[2] is None) is (batches == "packed")
    if state is not None:
        torch.testing.assert_close(others[2].layers[1].ssm, state.layers[1].ssm)


@pytest.fixture
def quick_compiler(monkeypatch):
    """Trace as a compiled run does, and spare the C++ compiler."""
    torch.compiler.reset()
    compile_blocks = partial(trainer.compile_blocks, backend="aot_eager")
    monkeypatch.setattr(trainer, "compile_blocks", compile_blocks)


@pytest.mark.compiles
def test_a_compiled_step_is_the_step(config, tmp_path, quick_compiler):
    numbers, weights, _ = one_step(config, tmp_path)
    others = one_step(config, tmp_path, compile=True)
    torch.testing.assert_close(others[0], numbers)
    assert others[1].keys() == weights.keys()
    torch.testing.assert_close(others[1], weights, rtol=1e-3, atol=1e-4)


@pytest.mark.compiles
@pytest.mark.parametrize("batches", ["packed", "continuing"])
def test_a_compiled_run_validates_stops_and_resumes(
    config, tmp_path, monkeypatch, quick_compiler, batches
):
    config = with_training(config, batches=batches, compile=True)
    train(config, tmp_path / "whole", say=quiet)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 7)
        with pytest.raises(Interrupted):
            train(config, tmp_path / "cut", say=quiet)
    said = []
    train(config, tmp_path / "cut", resume=True, say=said.append)
    assert_equal_runs(tmp_path / "whole", tmp_path / "cut")
    assert any(line.startswith("compiling the blocks") for line in said)
