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
  mambakit generate runs/demo --prompt "class Tree:" --weights int8
  mambakit generate state-spaces/mamba-130m-hf --prompt "A state is" --stop "<|endoftext|>"
  mambakit generate runs/demo --prompt-file long.txt --max-new-tokens 0 --save-state long.state
  mambakit generate runs/demo --state long.state --prompt "In short, "
"""
_EVALUATE = """\
example:
  mambakit evaluate runs/demo README.md docs
  mambakit evaluate models/mamba-130m README.md --tokenizer gpt-neox/tokenizer.json
"""
_CONVERT = """\
example:
  mambakit convert state-spaces/mamba-130m models/mamba-130m
  mambakit convert runs/demo models/demo --layout hf --dtype bfloat16
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
    try:
        options = _parser().parse_args(arguments)
        code: int = options.run(options)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("mambakit: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        _write_to_nowhere()
        return PIPE_CLOSED
    except OSError as error:
        reason = error.strerror or str(error)
        where = f"{error.filename}: " if error.filename is not None else ""
        return _refuse(f"{where}{reason}")
    except (ValueError, RuntimeError) as error:
        if not _is_ours(error.__traceback__):
            raise
        return _refuse(str(error))


def _refuse(sentence: str) -> int:
    """Say why a command ends, on one line whatever a file is called."""
    shown = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in sentence)
    print(f"mambakit: {''.join(shown)}", file=sys.stderr)
    return REFUSED


def _write_to_nowhere() -> None:
    # the reader of our output has left, and Python flushes once more at exit
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


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
    """Print a line at once, also into a pipe or a file: a run lasts minutes or days.

    It also outlives its reader: Ctrl-C ends ``| tee`` first, and the run must still be saved.
    """
    try:
        print(line, flush=True)
    except BrokenPipeError:
        _write_to_nowhere()


def _generate(options: argparse.Namespace) -> int:
    from mambakit._files import read_text, require_writable
    from mambakit.generation import Bookmark, complete
    from mambakit.training import keep_freed_memory, load_model
    from mambakit.training.precision import resolve_device

    keep_freed_memory()
    prompt = options.prompt
    if options.prompt_file is not None:
        prompt = read_text(options.prompt_file, "prompt")
    if prompt is None and options.state is None:
        raise ValueError("generate: give --prompt, --prompt-file or --state")
    if options.save_state is not None:
        require_writable(options.save_state)
    device = resolve_device(options.device, "generate: --device")
    model, tokenizer = load_model(options.model, options.tokenizer)
    model = model.to(device)
    place = None
    if options.state is not None:
        place = Bookmark.load(options.state, device=device, config=model.config)
        if len(place) != 1:
            raise ValueError(
                f"generate: {options.state} must hold one text, got {len(place)} side by side"
            )
    waiting = [prompt or ""]  # it is written with the first piece, when all is known to be well

    def write(_: int, piece: str) -> None:
        print(*waiting, piece, sep="", end="", flush=True)
        waiting.clear()

    done = complete(
        model,
        None if prompt is None else [prompt],
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        repetition_penalty=options.repetition_penalty,
        stop=options.stop,
        tokenizer=tokenizer,
        on_text=write if options.stream else None,
        seed=options.seed,
        state=place,
        weights=options.weights,
    )
    if not options.stream:
        write(0, "".join(done.texts or ()))
    print(*waiting, sep="")
    if options.save_state is not None:
        done.bookmark.save(options.save_state)
    return DONE


def _evaluate(options: argparse.Namespace) -> int:
    from mambakit.evaluation import LanguageScore, evaluate_files
    from mambakit.training import keep_freed_memory, load_model
    from mambakit.training.precision import resolve_device

    keep_freed_memory()
    device = resolve_device(options.device, "evaluate: --device")
    model, tokenizer = load_model(options.model, options.tokenizer)
    scores = evaluate_files(model.to(device), tokenizer, options.files)
    if len(scores) > 1:
        scores["all together"] = sum(scores.values(), LanguageScore(0.0, 0, 0))
    print(f"{'bits/byte':>9} {'perplexity':>10} {'bytes':>12}")
    for name, score in scores.items():
        print(
            f"{score.bits_per_byte:9.4f} {score.perplexity:10.4g} {score.bytes:12,.0f}  {name}"
        )
    return DONE


def _convert(options: argparse.Namespace) -> int:
    import torch

    from mambakit.training import convert_model
    from mambakit.training.run_folder import TOKENIZER

    model = convert_model(
        options.source,
        options.target,
        layout=options.layout,
        dtype=None if options.dtype is None else getattr(torch, options.dtype),
        revision=options.revision,
        local_files_only=options.local_files_only,
    )
    count = sum(parameter.numel() for parameter in model.parameters())
    dtype = model.backbone.embedding.weight.dtype
    tokenizer = f"with {TOKENIZER}" if (options.target / TOKENIZER).exists() else "no tokenizer"
    print(
        f"{options.target}: {count:,} parameters, {str(dtype).removeprefix('torch.')}, "
        f"layout {options.layout}, {tokenizer}"
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

    def source(use: argparse.ArgumentParser) -> None:
        use.add_argument(
            "model", metavar="MODEL", help="run folder, folder of a model, or id on the Hub"
        )
        use.add_argument(
            "--tokenizer", metavar="T",
            help="byte, character:FILE (with the characters of a text), or the path of a "
            "tokenizers JSON file (tokenizer.json beside the model)",
        )  # fmt: skip

    def device(use: argparse.ArgumentParser) -> None:
        use.add_argument(
            "--device", default="auto", metavar="D",
            help="cpu, cuda, cuda:1 or another of PyTorch's; auto is cuda where there is one "
            "and cpu elsewhere (auto)",
        )  # fmt: skip

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
    source(generate)
    prompt = generate.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", metavar="TEXT", help="the text to continue")
    prompt.add_argument("--prompt-file", type=Path, metavar="FILE", help="a file that holds it")
    generate.add_argument(
        "--state", type=Path, metavar="FILE",
        help="go on from where --save-state left a text; the prompt, if any, comes after it",
    )  # fmt: skip
    generate.add_argument(
        "--save-state", type=Path, metavar="FILE", help="keep the place to go on from"
    )
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
    generate.add_argument(
        "--weights", choices=("bf16", "int8"),
        help="round the weights that each new token reads, which makes it faster",
    )  # fmt: skip
    device(generate)
    generate.add_argument("--seed", type=int, metavar="S", help="the same seed, the same text")
    generate.add_argument(
        "--stop", action="append", default=[], metavar="TEXT",
        help="end where this text begins; may be given again",
    )  # fmt: skip

    evaluate = command("evaluate", "measure bits per byte and perplexity on files", _EVALUATE)
    evaluate.set_defaults(run=_evaluate)
    source(evaluate)
    device(evaluate)
    evaluate.add_argument("files", nargs="+", metavar="FILES", help="files or folders")

    convert = command("convert", "rewrite a model in another layout", _CONVERT)
    convert.set_defaults(run=_convert)
    convert.add_argument(
        "source", metavar="SOURCE", help="folder of a model, run folder, or id on the Hub"
    )
    convert.add_argument("target", type=Path, metavar="TARGET", help="folder to write")
    convert.add_argument(
        "--layout", choices=("mambakit", "hf", "mamba_ssm"), default="mambakit",
        help="our own (mambakit), transformers' (hf) or the authors' (mamba_ssm)",
    )  # fmt: skip
    convert.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="(that of SOURCE)"
    )
    convert.add_argument("--revision", metavar="R", help="branch, tag or commit on the Hub")
    convert.add_argument(
        "--local-files-only", action="store_true", help="take it from the Hub's cache"
    )

    doctor = command("doctor", "say what runs on this machine and check its numbers", _DOCTOR)
    doctor.set_defaults(run=_doctor)
    return parser
