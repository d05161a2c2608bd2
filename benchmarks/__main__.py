"""``python -m benchmarks [NAME ...]``: check, measure, write rows, print them."""

import argparse
import dataclasses
import importlib
import time
from pathlib import Path

import torch

from . import machine, rows

# Quick ones first. The number is how many rounds each runs unless told otherwise: a step of the
# slowest peer takes a minute.
BENCHMARKS = {
    "scan": 7,
    "conv": 15,
    "parity": 1,
    "memory": 1,
    "prefill": 3,
    "training_step": 1,
    "shakespeare": 1,
    "demo": 1,
}

_BUSY = 0.1


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Check every answer, then time it in turn with its peers.",
        epilog="example: python -m benchmarks scan conv --threads 2",
    )
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"one or more of {', '.join(BENCHMARKS)}; all"
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
    unknown = [name for name in options.names if name not in BENCHMARKS]
    if unknown:
        parser.error(f"NAME must be one of {', '.join(BENCHMARKS)}, got {unknown[0]}")
    if "shakespeare" in options.names and options.shakespeare is None:
        parser.error("shakespeare must be given its text by --shakespeare FILE, got none")
    if options.threads:
        torch.set_num_threads(options.threads)
    folder = options.results / machine.slug()
    described = machine.describe()
    if options.commit:
        described["commit"] = options.commit
    for name in options.names or BENCHMARKS:
        if name == "shakespeare" and options.shakespeare is None:
            print("shakespeare: left out, because it needs --shakespeare FILE\n")
            continue
        busy = machine.busy()
        if busy > _BUSY:
            print(f"{name}: other processes take {busy:.0%} of this machine; timings will lie")
        start = time.monotonic()
        measured = []
        benchmark = importlib.import_module(f"{__package__}.{name}")
        more = {"text": options.shakespeare} if name == "shakespeare" else {}
        for row in benchmark.run(options.rounds or BENCHMARKS[name], **more):
            measured.append(
                dataclasses.replace(row, machine=described | {"busy_before": round(busy, 3)})
            )
            print(row.text(), flush=True)
        rows.write(measured, folder / f"{name}.jsonl")
        print(f"{name}: {time.monotonic() - start:.0f} s, rows in {folder / name}.jsonl\n")


if __name__ == "__main__":
    main()
