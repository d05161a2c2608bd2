"""Laws of a run folder: it holds a run, or nothing that is in the way of one."""

import pytest

from mambakit.training import Interrupted, train, trainer
from mambakit.training.resume import checkpoint_steps
from mambakit.training.run_folder import new_run_folder, read_metrics


def quiet(line):
    pass


def fail_at(monkeypatch, step, error):
    """Let update ``step``, counted from 1, raise ``error``."""
    original, made = trainer.Learner.step, 0

    def step_or_fail(self, rate):
        nonlocal made
        made += 1
        if made == step:
            raise error
        return original(self, rate)

    monkeypatch.setattr(trainer.Learner, "step", step_or_fail)


TOO_LARGE = RuntimeError("train: a step of training needs more memory than this machine has")


@pytest.mark.parametrize("was_there", [False, True])
def test_a_first_step_that_fails_leaves_no_run(config, tmp_path, monkeypatch, was_there):
    folder = tmp_path / "run"
    if was_there:
        folder.mkdir()
    with monkeypatch.context() as patch:
        fail_at(patch, 1, TOO_LARGE)
        with pytest.raises(RuntimeError, match="needs more memory"):
            train(config, folder, say=quiet)
    assert folder.exists() == was_there
    assert train(config, folder, say=quiet).steps == 12


@pytest.mark.parametrize("step", [4, 7])
def test_a_later_step_that_fails_leaves_what_was_written(config, tmp_path, monkeypatch, step):
    with monkeypatch.context() as patch:
        fail_at(patch, step, TOO_LARGE)
        with pytest.raises(RuntimeError, match="needs more memory"):
            train(config, tmp_path / "run", say=quiet)
    assert checkpoint_steps(tmp_path / "run") == ([] if step == 4 else [5])
    assert read_metrics(tmp_path / "run")[0]["step"] == 2
    assert train(config, tmp_path / "run", resume=True, say=quiet).steps == 12


@pytest.mark.parametrize("stop", [KeyboardInterrupt, Interrupted])
def test_a_person_who_stops_a_run_may_go_on(config, tmp_path, monkeypatch, stop):
    with monkeypatch.context() as patch:
        fail_at(patch, 1, stop())
        with pytest.raises(stop):
            train(config, tmp_path / "run", say=quiet)
    assert train(config, tmp_path / "run", resume=True, say=quiet).steps == 12


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_preparing_a_run_leaves_nothing_however_it_fails(tmp_path, error):
    def prepare():
        with new_run_folder(tmp_path / "run"):
            (tmp_path / "run" / "tokens").mkdir()
            raise error

    with pytest.raises(error):
        prepare()
    assert list(tmp_path.iterdir()) == []
