"""Models to use or to convert, wherever they lie: in a run, in a folder, or on the Hub."""

import difflib
import os
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from mambakit._files import read_text, replacing
from mambakit.data import Tokenizer, load_tokenizer
from mambakit.models import MambaLM, checkpoint, load
from mambakit.models.hub import locate

from .run_folder import CONFIG, TOKENIZER, load_run_model

_ALPHABET = "character:"
_CONFIGS = (CONFIG, checkpoint.CONFIG)


class LoadedModel(NamedTuple):
    """A model, in evaluation mode, and the tokenizer whose ids it knows."""

    model: MambaLM
    tokenizer: Tokenizer


def load_model(source: str | os.PathLike[str], tokenizer: str | None = None) -> LoadedModel:
    """Load a model for the CPU, and the tokenizer that lies beside it or is named.

    Args:
        source: A run folder, whose best checkpoint is taken; the folder of a model in any
            layout; or the id of one on the Hub. Where ``a`` is a folder here, ``a/b`` is never
            an id: a run's name that is mistyped need not wait for a network.
        tokenizer: ``"byte"``; ``"character:FILE"``, whose alphabet is that of the text in FILE;
            or the path of a JSON file, as in ``mambakit.data.load_tokenizer``. ``None`` takes
            ``tokenizer.json`` beside the model.

    Raises:
        ValueError: There is no model or no tokenizer, a file of them is damaged, or the
            tokenizer has more ids than the model.
        RuntimeError: The Hub cannot be reached, or a package that the file needs is missing.

    Example:
        >>> import tempfile
        >>> from mambakit import MambaConfig
        >>> folder = tempfile.mkdtemp()
        >>> MambaLM(MambaConfig(d_model=16, n_layer=1, vocab_size=256)).save_pretrained(folder)
        >>> load_model(folder, "byte").tokenizer.decode([104, 105])
        'hi'
    """
    _refuse_mistyped(Path(source))
    folder = _locate(source)
    if tokenizer is not None:
        made = _make_tokenizer(tokenizer)
    elif os.path.lexists(folder / TOKENIZER):
        made = load_tokenizer(str(folder / TOKENIZER))
    else:
        raise ValueError(
            f"load: {source} must have a {TOKENIZER} beside the model, got none: name one by "
            f"--tokenizer, which takes byte, {_ALPHABET}FILE (a text) or the path of such a "
            "file"
        )
    model = _load(folder)
    known = model.config.vocab_size
    if made.vocab_size > known:
        raise ValueError(
            f"load: the tokenizer must have at most {known} ids like the model {source}, got "
            f"{made.vocab_size}: it is another model's"
        )
    return LoadedModel(model, made)


def convert_model(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    layout: Literal["mambakit", "hf", "mamba_ssm"] = "mambakit",
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
) -> MambaLM:
    """Write a model in another layout, with its ``tokenizer.json`` if it has one.

    Args:
        source: A run folder, the folder of a model, or the id of one on the Hub.
        target: The folder to write.
        layout: As in ``mambakit.models.save``.
        dtype: As in ``mambakit.models.load``.
        revision: Branch, tag or commit on the Hub; ``None`` means its main branch.
        local_files_only: Take Hub models from the cache and never ask the network.

    Returns:
        The model as it was written.

    Raises:
        ValueError: There is no model, a file of it is damaged, or ``target`` is a run folder,
            holds other weights, or holds a tokenizer and ``source`` has none to replace it.
        RuntimeError: The Hub cannot be reached, or ``target`` cannot be written.

    Example:
        >>> import tempfile
        >>> from mambakit import MambaConfig
        >>> ours, theirs = tempfile.mkdtemp(), tempfile.mkdtemp()
        >>> MambaLM(MambaConfig(d_model=16, n_layer=1, vocab_size=256)).save_pretrained(ours)
        >>> model = convert_model(ours, theirs, layout="hf")
        >>> torch.equal(MambaLM.from_pretrained(theirs).lm_head.weight, model.lm_head.weight)
        True
    """
    _refuse_mistyped(Path(source))
    folder, target = _locate(source, revision, local_files_only), Path(target)
    if (target / CONFIG).is_file():
        raise ValueError(f"convert: {target} must be no run folder: choose another")
    if os.path.lexists(folder / TOKENIZER):
        tokenizer = read_text(folder / TOKENIZER, "tokenizer")
    elif os.path.lexists(target / TOKENIZER):
        raise ValueError(
            f"convert: {target} must hold no {TOKENIZER}, for {source} has none to take its "
            "place: choose another folder"
        )
    else:
        tokenizer = None
    for name in (TOKENIZER, checkpoint.CONFIG):
        if (target / name).is_dir():
            raise ValueError(f"convert: {target / name} must be a file, got a folder")
    model = _load(folder, dtype)
    if tokenizer is None:
        model.save_pretrained(target, layout=layout)
        return model
    # the tokenizer is written before the weights and takes its place after them: a full disk
    # leaves what was there
    with replacing(target / TOKENIZER) as temporary:
        temporary.write_text(tokenizer, encoding="utf-8", newline="")
        model.save_pretrained(target, layout=layout)
    return model


def _refuse_mistyped(path: Path) -> None:
    if path.exists() or path.parent == Path() or not path.parent.is_dir():
        return
    near = difflib.get_close_matches(path.name, os.listdir(path.parent), n=1)
    hint = f"; did you mean {path.parent / near[0]}?" if near else ""
    raise ValueError(f"load: there is no {path.name} in the folder {path.parent}{hint}")


def _locate(
    source: str | os.PathLike[str], revision: str | None = None, local_files_only: bool = False
) -> Path:
    """Return the run folder, or the folder of the model alone."""
    folder = locate(source, revision=revision, local_files_only=local_files_only)
    if folder.is_dir() and not any((folder / name).is_file() for name in _CONFIGS):
        raise ValueError(
            f"load: {folder} must hold a run or a model, got neither {' nor '.join(_CONFIGS)}"
        )
    return folder


def _load(folder: Path, dtype: torch.dtype | None = None) -> MambaLM:
    if (folder / CONFIG).is_file():
        return load_run_model(folder, dtype=dtype)
    return load(folder, dtype=dtype).eval()


def _make_tokenizer(spec: str) -> Tokenizer:
    if spec == "character":
        raise ValueError(
            f"load: the tokenizer must be given its alphabet, as {_ALPHABET}FILE, got {spec!r}"
        )
    if spec.startswith(_ALPHABET):
        text = read_text(Path(spec.removeprefix(_ALPHABET)), "alphabet")
        return load_tokenizer("character", [text])
    return load_tokenizer(spec)
