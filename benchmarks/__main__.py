"""``python -m benchmarks [NAME ...]``: check, measure, write rows, print them as a table."""

import argparse
import dataclasses
import importlib
import time
from pathlib import Path

import torch

from . import machine, rows, tables

# Quick ones first. The number is how many rounds each runs unless told otherwise: a step of the
# slowest peer takes a minute.
BENCHMARKS = {
    "scan": 7,
    "conv": 15,
    "parity": 1,
    "memory": 1,
    "forks": 1,
    "prefill": 3,
    "decode": 5,
    "rounding": 1,
    "speculative": 7,
    "training_step": 1,
    "shakespeare": 1,
    "demo": 1,
}

# What a GPU measures. A step of a training run is long, and its times hardly differ.
GPU_BENCHMARKS = {
    "gpu_scan": 15,
    "gpu_conv": 15,
    "gpu_first_call": 3,
    "gpu_decode": 5,
    "gpu_training_step": 6,
    "gpu_figure8": 7,
    "gpu_million": 3,
}

_BUSY = 0.1


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Check every answer, then time it in turn with its peers.",
        epilog="examples: python -m benchmarks scan conv --threads 2; "
        "python -m benchmarks gpu_training_step --cases 370M",
    )
    every = BENCHMARKS | GPU_BENCHMARKS
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help=f"one or more of {', '.join(every)}; all of the GPU's, or where there is none, "
        "of the CPU's",
    )
    parser.add_argument(
        "--cases",
        default="",
        metavar="TEXT",
        help="measure only the cases whose names hold this (on a GPU; other rows are kept)",
    )
    parser.add_argument("--rounds", type=int, help="samples of each row")
    parser.add_argument("--threads", type=int, help="torch's threads; all cores")
    parser.add_argument(
        "--results", type=Path, default=rows.RESULTS, help="folder of the rows; %(default)s"
    )
    parser.add_argument(
        "--shakespeare",
        type=Path,
        metavar="FILE",
        help="tiny Shakespeare, which shakespeare needs",
    )
    parser.add_argument(
        "--commit", help="the commit to write into the rows, for a tree without its git history"
    )
    options = parser.parse_args()
    unknown = [name for name in options.names if name not in every]
    if unknown:
        parser.error(f"NAME must be one of {', '.join(every)}, got {unknown[0]}")
    has_gpu = torch.cuda.is_available()
    names = options.names or list(GPU_BENCHMARKS if has_gpu else BENCHMARKS)
    if not has_gpu and any(name in GPU_BENCHMARKS for name in names):
        parser.error("benchmarks of a GPU must have one, and torch finds none here")
    if options.cases and not all(name in GPU_BENCHMARKS for name in names):
        parser.error("--cases must go with benchmarks of a GPU alone")
    if "shakespeare" in options.names and options.shakespeare is None:
        parser.error("shakespeare must be given its text by --shakespeare FILE, got none")
    if options.threads:
        torch.set_num_threads(options.threads)
    for name in names:
        on_gpu = name in GPU_BENCHMARKS
        folder = options.results / (machine.gpu_slug() if on_gpu else machine.slug())
        described = machine.describe_gpu() if on_gpu else machine.describe()
        if options.commit:
            described["commit"] = options.commit
        if name == "shakespeare" and options.shakespeare is None:
            print("shakespeare: left out, because it needs --shakespeare FILE\n")
            continue
        busy = machine.busy()
        if busy > _BUSY:
            print(f"{name}: other processes take {busy:.0%} of this machine; timings will lie")
        start = time.monotonic()
        measured: list[rows.Row] = []
        file = folder / f"{name}.jsonl"
        benchmark = importlib.import_module(f"{__package__}.{name}")
        more = {"text": options.shakespeare} if name == "shakespeare" else {}
        more |= {"cases": options.cases} if on_gpu else {}
        for row in benchmark.run(options.rounds or every[name], **more):
            measured.append(
                dataclasses.replace(row, machine=described | {"busy_before": round(busy, 3)})
            )
            print(row.text(), flush=True)
            if on_gpu:  # all take long: whatever stops a later row, these are kept
                rows.write(rows.merge(file, measured), file)
        rows.write(rows.merge(file, measured) if options.cases else measured, file)
        print(f"{name}: {time.monotonic() - start:.0f} s, rows in {folder / name}.jsonl\n")
        if measured:
            print(tables.text(name, measured), flush=True)


if __name__ == "__main__":
    main()
