"""Folders and files of others: one sentence, and what was saved is as it was."""

import os
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from mambakit import MambaConfig, MambaLM, cli
from mambakit.models import ModelState
from mambakit.training import trainer

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.skipif(os.name != "posix", reason="permissions are others here"),
]
NOBODY = 65534
TEXT = "A folder that may not be written to.\n" * 40


@contextmanager
def locked(folder):
    """Let nobody write below ``folder``; root may write anywhere, and steps down for it."""
    everything = [folder, *folder.rglob("*")]
    modes = [path.stat().st_mode for path in everything]
    for path, mode in zip(everything, modes, strict=True):
        path.chmod(0o555 if path.is_dir() else 0o444 if mode & 0o400 else 0)
    root = os.geteuid() == 0
    try:
        if root:
            os.seteuid(NOBODY)
        if not os.access(folder, os.R_OK | os.X_OK, effective_ids=True):
            pytest.skip(f"{folder} is closed to user {NOBODY}")
        yield
    finally:
        if root:
            os.seteuid(0)
        for path, mode in zip(everything, modes, strict=True):
            path.chmod(mode)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def folder():
    """A folder that every user may look into, unlike pytest's own."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


def test_the_folder_is_locked_in_earnest(folder):
    with locked(folder), pytest.raises(PermissionError):
        (folder / "file").write_text("")


def test_models_and_states_stay_as_they_were(folder):
    old, new = (MambaLM(MambaConfig(d_model=8, n_layer=1, vocab_size=16)) for _ in range(2))
    old.save_pretrained(folder)
    old(torch.tensor([[1, 2]])).state.save(folder / "state")
    before, state = contents(folder), new(torch.tensor([[3, 4]])).state
    with locked(folder):
        for save, name in (
            (lambda: new.save_pretrained(folder), "config.json"),
            (lambda: new.save_pretrained(folder / "new"), "new/config.json"),
            (lambda: state.save(folder / "state"), "state"),
        ):
            words = rf"^cannot write {folder / name}: [^\n]*Permission denied[^\n]*$"
            with pytest.raises(RuntimeError, match=words):
                save()
    assert contents(folder) == before
    assert len(ModelState.load(folder / "state", config=old.config)) == 1
    again = MambaLM.from_pretrained(folder)
    assert torch.equal(again.lm_head.weight, old.lm_head.weight)


@pytest.fixture
def command(folder):
    """The words that train for a few steps, in a folder of their own."""
    (folder / "text.txt").write_text(TEXT)
    (folder / "run.toml").write_text(
        f"""
        data = {{files = ["{folder / "text.txt"}"], split = "position"}}
        model = {{d_model = 8, n_layer = 1, d_state = 2}}
        training = {{batch_size = 2, length = 16, evaluate_every = 2, steps = 4}}
        report = {{prompt = "A ", tokens = 5}}
        """
    )
    return ["train", str(folder / "run.toml"), "--out"]


def sentence(capsys):
    """What the last command wrote as its error."""
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "Traceback" not in error
    return error


def test_no_run_begins_there(folder, command, capsys):
    assert cli.main([*command, str(folder / "first")]) == 0  # all that is imported late is now
    (folder / "runs").mkdir()
    capsys.readouterr()
    for out in (folder / "runs" / "mine", folder / "runs"):
        with locked(folder / "runs"):
            assert cli.main([*command, str(out)]) == 2
        error = sentence(capsys)
        assert "Permission denied" in error
        assert str(out) in error
    assert list((folder / "runs").iterdir()) == []


def test_a_run_that_became_read_only_goes_on_later(folder, command, capsys, monkeypatch):
    out, step, made = folder / "run", trainer.Learner.step, []

    def stop_at_the_third(self, rate):
        made.append(rate)
        if len(made) == 3:
            raise KeyboardInterrupt
        return step(self, rate)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Learner, "step", stop_at_the_third)
        assert cli.main([*command, str(out)]) == 130
    before = contents(out)
    with locked(out):
        assert cli.main([*command, str(out), "--resume"]) == 2
    assert "Permission denied" in sentence(capsys)
    assert contents(out) == before
    assert cli.main([*command, str(out), "--resume"]) == 0


def test_a_file_that_may_not_be_read_is_said_to_be_that(folder):
    model = MambaLM(MambaConfig(d_model=8, n_layer=1, vocab_size=16))
    model.save_pretrained(folder)
    model(torch.tensor([[1, 2]])).state.save(folder / "state")
    for name in ("model.safetensors", "state"):
        (folder / name).chmod(0)
    with locked(folder):
        for load, name in (
            (MambaLM.from_pretrained, "model.safetensors"),
            (lambda folder: ModelState.load(folder / "state"), "state"),
        ):
            words = f"^load: cannot read {folder / name}: Permission denied$"
            with pytest.raises(ValueError, match=words):
                load(folder)
