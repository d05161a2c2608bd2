"""The ``mambakit`` command: it turns arguments into one call, and errors into one sentence.

Nothing heavy is imported before it is known that it is needed, so that ``--help`` is quick.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from types import TracebackType

DONE, CHECK_FAILED, REFUSED = 0, 1, 2
# As a shell reports them: 128 and the number of the signal, SIGINT and SIGPIPE.
INTERRUPTED, PIPE_CLOSED = 130, 141

_TRAIN = """\
example, in a clone of the repository (recipes/ is not installed):
  mambakit train recipes/demo.toml --out runs/demo --set training.minutes=2
  mambakit train recipes/demo.toml --out runs/demo --resume
"""
_GENERATE = """\
example:
  mambakit generate runs/demo --prompt "def main():" --max-new-tokens 200 --top-p 0.9 --stream
  mambakit generate runs/demo --prompt-file start.txt --temperature 0 --stop "class "
"""
_EVALUATE = """\
example:
  mambakit evaluate runs/demo README.md src
"""
_DOCTOR = """\
example:
  mambakit doctor && mambakit train run.toml --out runs/mine
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    0 is success, 1 a check of ``doctor`` that failed, 2 arguments, files or a machine that
    cannot do what was asked (one sentence on standard error), 130 an interruption. An
    exception that this package did not raise itself is a bug: it keeps its traceback.
    """
    options = _parser().parse_args(arguments)
    try:
        code: int = options.run(options)
        if sys.stdout is not None:  # closed by the caller: `>&-`
            sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("mambakit: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has left. Python flushes once more at exit: into nothing.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    except OSError as error:
        reason = error.strerror or str(error)
        where = f"{error.filename}: " if error.filename is not None else ""
        print(f"mambakit: {where}{reason}", file=sys.stderr)
        return REFUSED
    except (ValueError, RuntimeError) as error:
        if not _is_ours(error.__traceback__):
            raise
        print(f"mambakit: {error}", file=sys.stderr)
        return REFUSED


def _is_ours(traceback: TracebackType | None) -> bool:
    """Tell whether the exception was raised by a line of this package."""
    name = ""
    while traceback is not None:
        name = traceback.tb_frame.f_globals.get("__name__", "")
        traceback = traceback.tb_next
    return name.partition(".")[0] == "mambakit"


def _train(options: argparse.Namespace) -> int:
    from mambakit.training import Interrupted, closing_report, load_config, train

    config = load_config(options.config, options.set)
    folder = options.out or Path("runs", options.config.stem)
    try:
        train(config, folder, resume=options.resume, say=_say)
    except Interrupted:
        return INTERRUPTED  # the run has said how to go on
    closing_report(folder, say=_say)
    return DONE


def _say(line: str) -> None:
    """Print a line at once, also into a pipe or a file: a run lasts minutes or days."""
    print(line, flush=True)


def _generate(options: argparse.Namespace) -> int:
    from mambakit._files import read_text
    from mambakit.generation import stream_text
    from mambakit.training import keep_freed_memory, load_run

    keep_freed_memory()
    prompt = options.prompt
    if prompt is None:
        prompt = read_text(options.prompt_file, "prompt")
    run = load_run(options.run_folder)
    pieces = stream_text(
        run.model,
        run.tokenizer,
        prompt,
        max_new_tokens=options.max_new_tokens,
        stop=options.stop,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        repetition_penalty=options.repetition_penalty,
        seed=options.seed,
    )
    if not options.stream:
        pieces = iter(["".join(pieces)])
    print(prompt, end="", flush=options.stream)
    for piece in pieces:
        print(piece, end="", flush=options.stream)
    print()
    return DONE


def _evaluate(options: argparse.Namespace) -> int:
    from mambakit.evaluation import LanguageScore, evaluate_files
    from mambakit.training import keep_freed_memory, load_run

    keep_freed_memory()
    run = load_run(options.run_folder)
    scores = evaluate_files(run.model, run.tokenizer, options.files)
    if len(scores) > 1:
        scores["all together"] = sum(scores.values(), LanguageScore(0.0, 0, 0))
    print(f"{'bits/byte':>9} {'perplexity':>10} {'bytes':>12}")
    for name, score in scores.items():
        print(
            f"{score.bits_per_byte:9.4f} {score.perplexity:10.4g} {score.bytes:12,.0f}  {name}"
        )
    return DONE


def _doctor(options: argparse.Namespace) -> int:
    from mambakit.doctor import report

    return DONE if report() else CHECK_FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mambakit",
        description="Train Mamba language models and sample from them.",
        epilog=_TRAIN + "\nmambakit COMMAND --help tells more",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--version", action="version", version=f"mambakit {version('mambakit')}"
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(name: str, summary: str, epilog: str) -> argparse.ArgumentParser:
        return commands.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    train = command("train", "train a model as a TOML file says", _TRAIN)
    train.set_defaults(run=_train)
    train.add_argument("config", type=Path, help="the run: data, tokenizer, model, training")
    train.add_argument(
        "--set", action="append", default=[], metavar="TABLE.KEY=VALUE",
        help="change one value of the file; may be given again",
    )  # fmt: skip
    train.add_argument(
        "--out", type=Path, metavar="RUN", help="run folder (runs/ and the name of the file)"
    )
    train.add_argument(
        "--resume", action="store_true", help="go on from the last checkpoint in the run folder"
    )

    generate = command("generate", "continue a text with a trained model", _GENERATE)
    generate.set_defaults(run=_generate)
    generate.add_argument(
        "run_folder", type=Path, metavar="RUN", help="run folder of the model"
    )
    prompt = generate.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="the text to continue")
    prompt.add_argument("--prompt-file", type=Path, metavar="FILE", help="a file that holds it")
    generate.add_argument(
        "--stream", action="store_true", help="write the text while it is being made"
    )
    generate.add_argument("--max-new-tokens", type=int, default=200, metavar="N", help="(200)")
    generate.add_argument(
        "--temperature", type=float, default=1.0, metavar="T",
        help="0 takes the likeliest token, 1 samples as the model says (1)",
    )  # fmt: skip
    generate.add_argument("--top-k", type=int, metavar="K", help="only the K likeliest tokens")
    generate.add_argument(
        "--top-p",
        type=float,
        metavar="P",
        help="only the likeliest tokens that make up P together",
    )
    generate.add_argument(
        "--min-p",
        type=float,
        metavar="P",
        help="only tokens at least P times as likely as the best",
    )
    generate.add_argument(
        "--repetition-penalty", type=float, default=1.0, metavar="R",
        help="above 1: tokens that occurred become less likely (1)",
    )  # fmt: skip
    generate.add_argument("--seed", type=int, metavar="S", help="the same seed, the same text")
    generate.add_argument(
        "--stop", action="append", default=[], metavar="TEXT",
        help="end where this text begins; may be given again",
    )  # fmt: skip

    evaluate = command("evaluate", "measure bits per byte and perplexity on files", _EVALUATE)
    evaluate.set_defaults(run=_evaluate)
    evaluate.add_argument(
        "run_folder", type=Path, metavar="RUN", help="run folder of the model"
    )
    evaluate.add_argument("files", nargs="+", metavar="FILES", help="files or folders")

    doctor = command("doctor", "say what runs on this machine and check its numbers", _DOCTOR)
    doctor.set_defaults(run=_doctor)
    return parser
