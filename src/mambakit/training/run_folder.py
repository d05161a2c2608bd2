"""The folder that a run writes, and what others read from it.

config.toml      the run as it was started, complete
tokenizer.json   for generation and evaluation
metrics.jsonl    a line for every few steps and for every validation
loss.png         the same as a picture
checkpoints/     the last and the best
tokens/          the text as tokens (unless data.cache names another place)
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from mambakit._files import read_text, replacing, sweep
from mambakit.data import Tokenizer, load_tokenizer, save_tokenizer
from mambakit.models import MambaLM

from .config import RunConfig, dump_config, load_config
from .resume import (
    checkpoint_folder,
    checkpoint_steps,
    load_checkpoint_model,
    read_run_state,
)

CONFIG, TOKENIZER, METRICS = "config.toml", "tokenizer.json", "metrics.jsonl"
PLOT, TOKENS = "loss.png", "tokens"


def _refuse_existing(folder: Path) -> None:
    if folder.is_dir() and (folder / CONFIG).exists():
        raise ValueError(
            f"train: the run folder {folder} must be new, got one that holds a run: "
            "continue it with --resume or choose another"
        )
    # a start that was killed before it became a run may have left these
    if folder.exists() and not (
        folder.is_dir()
        and all(
            entry.name in (TOKENS, TOKENIZER) or entry.name.endswith(".tmp")
            for entry in folder.iterdir()
        )
    ):
        raise ValueError(
            f"train: the run folder {folder} must be new, got one that exists: choose another"
        )


def _make_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe.{os.getpid()}.tmp"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise RuntimeError(f"cannot write {folder}: {error.strerror or error}") from error


@contextmanager
def new_run_folder(folder: Path) -> Iterator[None]:
    """Make ``folder`` for a new run, and leave nothing of it if there is nothing to keep.

    The block prepares the run and makes it. If it fails before the run has a line of metrics or
    a checkpoint (a step needs more memory than there is, say), the way is free for another try.
    Only a run that began and was interrupted by a person is left to be resumed.

    Raises:
        ValueError: ``folder`` is a file, or holds a run or anything else.
        RuntimeError: ``folder`` cannot be made or written.
    """
    _refuse_existing(folder)
    was_there = folder.exists()
    _make_writable(folder)
    try:
        yield
    except BaseException as error:
        begun = (folder / CONFIG).exists()
        if not (begun and (isinstance(error, KeyboardInterrupt) or _has_results(folder))):
            (folder / CONFIG).unlink(missing_ok=True)  # first: without it there is no run
            (folder / METRICS).unlink(missing_ok=True)
            if not was_there:
                shutil.rmtree(folder)
        raise


def _has_results(folder: Path) -> bool:
    metrics = folder / METRICS
    return bool(checkpoint_steps(folder)) or (metrics.exists() and metrics.stat().st_size > 0)


def write_start(folder: Path, config: RunConfig, tokenizer: Tokenizer) -> None:
    """Write what a run is started with; ``config.toml`` comes last and makes it a run."""
    save_tokenizer(tokenizer, folder / TOKENIZER)
    with replacing(folder / CONFIG) as temporary:
        temporary.write_text(dump_config(config), encoding="utf-8")


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Read the lines of ``metrics.jsonl``; a last line that was cut short is left out.

    Raises:
        ValueError: Another line is damaged; the sentence names it.
    """
    path = folder / METRICS
    if not path.exists():
        return []
    lines = read_text(path, "metrics").splitlines(keepends=True)
    return [
        _metrics_row(line, f"{path}, line {number},")
        for number, line in enumerate(lines, start=1)
        if line.endswith("\n")
    ]


def _metrics_row(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"metrics: {where} must be JSON, got {error.msg}") from error
    match row:
        case {"kind": "train" | "validation", "step": int()}:
            return row
        case _:
            raise ValueError(f"metrics: {where} must have a kind and a step, got {row!r}")


class Metrics:
    """``metrics.jsonl``, open for appending.

    Opening it drops the lines of updates after ``step`` and of validations after
    ``evaluated``: a killed process made them after its last checkpoint, and they are now
    made again.
    """

    def __init__(self, folder: Path, *, step: int, evaluated: int) -> None:
        last = {"train": step, "validation": evaluated}
        self.rows = [row for row in read_metrics(folder) if row["step"] <= last[row["kind"]]]
        self._path = folder / METRICS
        with replacing(self._path) as temporary:
            temporary.write_text("".join(map(self._line, self.rows)), encoding="utf-8")

    @staticmethod
    def _line(row: Mapping[str, Any]) -> str:
        return json.dumps(row) + "\n"

    def append(self, row: dict[str, Any]) -> None:
        """Add a line.

        Raises:
            RuntimeError: The file cannot be written.
        """
        self.rows.append(row)
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(self._line(row))
        except OSError as error:
            raise RuntimeError(
                f"cannot write {self._path}: {error.strerror or error}"
            ) from error


def tidy(folder: Path) -> None:
    """Remove what killed processes left half-written."""
    sweep(folder)
    sweep(folder / "checkpoints")
    sweep(folder / TOKENS)


class LoadedRun(NamedTuple):
    """What a run folder holds, ready to use.

    Attributes:
        model: The language model of one checkpoint, in evaluation mode.
        tokenizer: The tokenizer it was trained with.
        config: The run.
        step: The step of the checkpoint.
    """

    model: MambaLM
    tokenizer: Tokenizer
    config: RunConfig
    step: int


def load_run(
    folder: str | os.PathLike[str],
    *,
    which: Literal["best", "last"] = "best",
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> LoadedRun:
    """Load the model, tokenizer and config of a run.

    Args:
        folder: The run folder.
        which: The checkpoint with the best validation, or the last one.
        device: Where the weights go.
        dtype: See ``mambakit.models.load``.

    Raises:
        ValueError: ``folder`` is no run, has no checkpoint yet, or a file of it is damaged.
    """
    folder = Path(folder)
    step = _chosen_step(folder, which)
    model = load_checkpoint_model(checkpoint_folder(folder, step), device=device, dtype=dtype)
    config = load_config(folder / CONFIG)
    return LoadedRun(model, load_tokenizer(str(folder / TOKENIZER)), config, step)


def load_run_model(folder: Path, *, dtype: torch.dtype | None = None) -> MambaLM:
    """Load the model of a run's best checkpoint, whatever its tokenizer is.

    Raises:
        ValueError: As ``load_run``.
    """
    load_config(folder / CONFIG)  # a damaged run is refused as a whole
    return load_checkpoint_model(
        checkpoint_folder(folder, _chosen_step(folder, "best")), dtype=dtype
    )


def _chosen_step(folder: Path, which: str) -> int:
    if which not in ("best", "last"):
        raise ValueError(f"load_run: which must be 'best' or 'last', got {which!r}")
    if not (folder / CONFIG).is_file():
        raise ValueError(
            f"load_run: {folder} must be a run folder, got one without {CONFIG} (where "
            "there is a checkpoint alone, mambakit.models.load reads its model)"
        )
    steps = checkpoint_steps(folder)
    if not steps:
        raise ValueError(f"load_run: the run {folder} must have a checkpoint, got none yet")
    step = steps[-1]
    if which == "best":
        step = read_run_state(checkpoint_folder(folder, step)).best_step or step
    return step
