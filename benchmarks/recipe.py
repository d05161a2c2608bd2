"""Run a recipe as its user would, and read from the run folder what it reached."""

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from mambakit.training import LoadedRun, load_run
from mambakit.training.run_folder import read_metrics

RECIPES = Path(__file__).parent.parent / "recipes"


class Reached(NamedTuple):
    """What a run of a recipe came to.

    Attributes:
        run: The best model, its tokenizer and its config.
        validation_loss: Its loss on the validation text, in nats for each token.
        seconds: From the command's start to its end: imports, tokens, report and all.
        training_seconds: What of it was training, validations included.
        tokens_per_second: The median over the run.
        parameters: Numbers in the model.
    """

    run: LoadedRun
    validation_loss: float
    seconds: float
    training_seconds: float
    tokens_per_second: float
    parameters: int


def reach(recipe: str, folder: Path, overrides: Sequence[str] = ()) -> Reached:
    """Train by the command line into ``folder``, on as many threads as this process has."""
    command = [sys.executable, "-m", "mambakit", "train", str(RECIPES / recipe)]
    command += ["--out", str(folder)]
    for override in overrides:
        command += ["--set", override]
    threads = str(torch.get_num_threads())
    start = time.perf_counter()
    subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": threads}, check=True, stdout=sys.stderr
    )
    seconds = time.perf_counter() - start
    metrics = read_metrics(folder)
    run = load_run(folder, which="best")
    return Reached(
        run,
        min(line["loss"] for line in metrics if line["kind"] == "validation"),
        seconds,
        metrics[-1]["seconds"],
        statistics.median(r["tokens_per_second"] for r in metrics if r["kind"] == "train"),
        sum(parameter.numel() for parameter in run.model.parameters()),
    )
