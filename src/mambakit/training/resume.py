"""Checkpoints of a run: everything that decides what the next step computes.

A checkpoint is a folder ``checkpoints/step-00000400`` that appears whole or not at all:

    model.safetensors, config.json    the model, as ``mambakit.models.save`` writes it
    training.safetensors              AdamW's moments, random generators, the carried state
    training.json                     step, place in the batches, best score so far
    checksums.json                    SHA-256 of the two files of tensors
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import dacite
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mambakit._files import read_text, replacing, sweep
from mambakit.data import Batches
from mambakit.models import MambaLM, ModelState, load, save
from mambakit.modules import MixerState

from .optimizer import load_optimizer_tensors, optimizer_tensors


@dataclass
class RunState:
    """How far a run has come: the numbers that are not tensors.

    Attributes:
        step: Updates made.
        evaluated: The last step whose validation is written down; 0 for none.
        best_step: The step of the best validation; 0 for none.
        best_loss: Its loss in nats for each token; infinity for none.
        seconds: Time spent on training by all processes of the run.
        batches: The place in the batches.
        text: Digest of the training text's tokens.
        validation: Digest of the validation text's tokens; empty if there is none.
        recent: Losses since the last line of the metrics.
    """

    step: int = 0
    evaluated: int = 0
    best_step: int = 0
    best_loss: float = float("inf")
    seconds: float = 0.0
    batches: dict[str, int] = field(default_factory=dict)
    text: str = ""
    validation: str = ""
    recent: list[float] = field(default_factory=list)


def checkpoint_folder(folder: Path, step: int) -> Path:
    """Name the checkpoint of ``step`` in the run ``folder``."""
    return folder / "checkpoints" / f"step-{step:08d}"


def checkpoint_steps(folder: Path) -> list[int]:
    """List the steps that the run ``folder`` has checkpoints of, in rising order."""
    return sorted(
        int(path.name.removeprefix("step-"))
        for path in (folder / "checkpoints").glob("step-*")
        if path.name.removeprefix("step-").isdigit()
    )


def _generators(device: torch.device) -> dict[str, Tensor]:
    states = {"random.cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["random.cuda"] = torch.cuda.get_rng_state(device)
    return states


def _carried(state: ModelState | None) -> dict[str, Tensor]:
    if state is None:
        return {}
    return {
        f"state.{i}.{name}": tensor.contiguous()
        for i, layer in enumerate(state.layers)
        for name, tensor in layer._asdict().items()
    }


_CHECKSUMS = "checksums.json"
_TENSORS = ("model.safetensors", "training.safetensors")


def _checksum(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _require_as_written(path: Path) -> None:
    """Refuse a file of tensors that has changed since; older versions left nothing to tell."""
    record = path.with_name(_CHECKSUMS)
    if not record.exists():
        return
    try:
        same = json.loads(read_text(record, "checkpoint"))[path.name] == _checksum(path)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"resume: {record} must be a whole file, got {error!r}") from error
    if not same:
        raise ValueError(f"load: {path} must be as it was written, got one that was changed")


def load_checkpoint_model(
    checkpoint: Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> MambaLM:
    """Load the model of a checkpoint, in evaluation mode.

    Raises:
        ValueError: A file is missing, damaged or not as it was written.
    """
    model = load(checkpoint, device=device, dtype=dtype)
    _require_as_written(checkpoint / _TENSORS[0])
    return model.eval()


def _write_run_state(path: Path, run: RunState) -> None:
    # JSON has no infinity: no score yet is null
    record = asdict(run) | {"best_loss": run.best_loss if run.best_step else None}
    path.write_text(json.dumps(record, indent=2), encoding="utf-8")


def save_checkpoint(
    folder: Path,
    run: RunState,
    model: MambaLM,
    optimizer: torch.optim.Optimizer,
    state: ModelState | None,
) -> None:
    """Write the checkpoint of ``run.step``, then drop all others but the best one.

    Raises:
        RuntimeError: The folder cannot be written. Older checkpoints are still there.
    """
    target = checkpoint_folder(folder, run.step)
    if target.exists():
        # resumed at a step whose validation was still to come: only the numbers are new
        with replacing(target / "training.json") as temporary:
            _write_run_state(temporary, run)
    else:
        moments = {f"optimizer.{k}": v for k, v in optimizer_tensors(model, optimizer).items()}
        with replacing(target) as temporary:
            temporary.mkdir()
            save(model, temporary)
            save_file(
                {**moments, **_generators(model.device), **_carried(state)},
                temporary / "training.safetensors",
            )
            _write_run_state(temporary / "training.json", run)
            checksums = {name: _checksum(temporary / name) for name in _TENSORS}
            (temporary / _CHECKSUMS).write_text(json.dumps(checksums, indent=2), "utf-8")
    for step in checkpoint_steps(folder):
        if step not in (run.step, run.best_step):
            # the new name marks it as rubbish, should the removal be cut short
            old = checkpoint_folder(folder, step)
            old.rename(old.with_name(f".{old.name}.tmp"))
    sweep(folder / "checkpoints")


def read_run_state(checkpoint: Path) -> RunState:
    """Read the numbers of a checkpoint.

    Raises:
        ValueError: The file is missing or damaged.
    """
    path = checkpoint / "training.json"
    try:
        record: dict[str, Any] = json.loads(read_text(path, "checkpoint"))
        missing = asdict(RunState()).keys() - record.keys()
        if missing:
            raise KeyError(*sorted(missing))
        if record["best_loss"] is None:
            record["best_loss"] = float("inf")
        return dacite.from_dict(RunState, record, dacite.Config(strict=True))
    except (json.JSONDecodeError, KeyError, AttributeError, dacite.DaciteError) as error:
        raise ValueError(f"resume: {path} must be a whole checkpoint, got {error!r}") from error


def load_checkpoint(
    checkpoint: Path, model: MambaLM, optimizer: torch.optim.Optimizer, batches: Batches
) -> tuple[RunState, ModelState | None]:
    """Put the training state of a checkpoint back; the model is loaded already.

    Returns:
        The numbers of the run, and the state that its last batch left (``None`` if none).

    Raises:
        ValueError: A file is missing, damaged or of another model.
    """
    run = read_run_state(checkpoint)
    try:
        batches.load_state_dict(run.batches)
    except ValueError as error:
        raise ValueError(
            f"resume: {checkpoint / 'training.json'} must be a whole checkpoint, got: {error}"
        ) from error

    path = checkpoint / "training.safetensors"
    try:
        tensors = load_file(path)
        prefix = "optimizer."
        moments = {
            k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)
        }
        load_optimizer_tensors(model, optimizer, moments)
        _restore_generators(tensors, model.device)
        state = _carried_from(tensors, model)
    except KeyError as error:
        raise ValueError(
            f"resume: {path} must be a whole checkpoint, got no tensor {error}"
        ) from error
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"resume: {path} must be a whole checkpoint, got: {error}") from error
    _require_as_written(path)
    return run, state


def _restore_generators(tensors: dict[str, Tensor], device: torch.device) -> None:
    for name, now in _generators(device).items():
        # a run that began on a CPU has nothing of another device's generator
        then = tensors["random.cpu"] if name == "random.cpu" else tensors.get(name, now)
        if (then.dtype, then.shape) != (now.dtype, now.shape):
            raise ValueError(
                f"{name} must be {now.dtype} of shape {tuple(now.shape)}, got {then.dtype} of "
                f"shape {tuple(then.shape)}"
            )
        if name == "random.cpu":
            torch.set_rng_state(then)
        else:
            torch.cuda.set_rng_state(then, device)


def _carried_from(tensors: dict[str, Tensor], model: MambaLM) -> ModelState | None:
    if not any(name.startswith("state.") for name in tensors):
        return None
    return ModelState(
        tuple(
            MixerState(
                *(tensors[f"state.{i}.{name}"].to(model.device) for name in MixerState._fields)
            )
            for i in range(model.config.n_layer)
        )
    )
