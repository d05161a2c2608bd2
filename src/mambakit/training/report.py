"""What a run has come to: its score beside a compressor's, a sample, and where it lies."""

import lzma
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from mambakit.data import Document, Tokenizer
from mambakit.data.shards import encode_document
from mambakit.evaluation import LanguageScore, evaluate_whole
from mambakit.generation import generate
from mambakit.models import MambaLM

from .config import ReportConfig, RunConfig, load_config
from .corpus import find_splits
from .precision import resolve_device
from .progress import count, format_seconds
from .resume import checkpoint_folder, checkpoint_steps, read_run_state
from .run_folder import CONFIG, load_run

Say = Callable[[str], None]


def _score(
    model: MambaLM, tokenizer: Tokenizer, documents: Sequence[Document], config: RunConfig
) -> tuple[LanguageScore, bytes]:
    """Score documents laid end to end, separators and all, as they were in training."""
    separator = config.data.separator
    data = b"".join(document.read() + separator.encode() for document in documents)
    parts = [encode_document(d, tokenizer, separator) for d in documents]
    score = evaluate_whole(
        model,
        tokenizer,
        np.concatenate(parts),
        size=len(data),
        documents=np.cumsum([0, *map(len, parts)])
        if config.training.reset_at_documents
        else None,
    )
    return score, data


def check_prompt(report: ReportConfig, tokenizer: Tokenizer) -> None:
    """Refuse, before a run begins, a prompt that the sample at its end could not continue.

    Raises:
        ValueError: The tokenizer cannot represent the prompt, or makes no token of it.
    """
    if report.tokens:
        _encode_prompt(report, tokenizer)


def _encode_prompt(report: ReportConfig, tokenizer: Tokenizer) -> NDArray[np.int64]:
    try:
        tokens = tokenizer.encode(report.prompt)
    except ValueError as error:
        raise ValueError(
            f"config: report.prompt must be text that the tokenizer reads, "
            f"got {report.prompt!r}: {error}"
        ) from error
    if len(tokens) == 0:
        raise ValueError(
            f"config: report.prompt must be at least one token long, got {report.prompt!r}"
        )
    return tokens


def _sample(model: MambaLM, tokenizer: Tokenizer, report: ReportConfig) -> str:
    prompt = torch.from_numpy(_encode_prompt(report, tokenizer))[None].to(model.device)
    tokens = generate(
        model,
        prompt,
        vocab_size=min(tokenizer.vocab_size, model.config.vocab_size),
        max_new_tokens=report.tokens,
        temperature=report.temperature,
        top_p=report.top_p,
        seed=report.seed,
    )
    return tokenizer.decode(tokens[0].tolist())


def closing_report(folder: Path, *, say: Say = print) -> None:
    """Say how a finished run does on text it has not seen, and show what it writes.

    Bits per byte are those of the best checkpoint on the test text (the validation text if
    there is no test), beside ``xz -9`` on the same bytes. Both are complete codes for these
    bytes; xz knows nothing before them, the model knows the training text.

    Args:
        folder: The run folder.
        say: Where the lines go.

    Raises:
        ValueError: ``folder`` is no run with a checkpoint, or its text is gone.
    """
    folder = Path(folder)
    device = resolve_device(load_config(folder / CONFIG).training.device)
    model, tokenizer, config, _ = load_run(folder, device=device)
    splits = find_splits(config.data)
    part = "test" if splits.test else "validation"
    documents = splits.test or splits.validation
    if documents:
        score, data = _score(model, tokenizer, documents, config)
        squeezed = 8 * len(lzma.compress(data, preset=9)) / len(data)
        last = read_run_state(checkpoint_folder(folder, checkpoint_steps(folder)[-1]))
        learnt = sum(d.size for d in splits.train)
        files = count(len(documents), "file")
        say("")
        say(f"bits per byte on the whole {part} text ({len(data):,} bytes, {files}):")
        say(
            f"  this model  {score.bits_per_byte:.3f}   after {format_seconds(last.seconds)} "
            f"with the {learnt:,} bytes of the training text"
        )
        say(f"  xz -9       {squeezed:.3f}   which starts from nothing")
    if config.report.tokens:
        say("")
        say(f"a sample, after {config.report.prompt!r}:")
        say("")
        say(_sample(model, tokenizer, config.report))
    say("")
    say(f"everything is in {folder}: {', '.join(sorted(p.name for p in folder.iterdir()))}")
    prompt = shlex.quote(config.report.prompt if config.report.prompt.strip() else "The")
    say(f"more: mambakit generate {shlex.quote(str(folder))} --prompt {prompt} --stream")
