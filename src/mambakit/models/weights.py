"""Tensors in files: one file or several shards, of safetensors or of ``torch.save``."""

import json
import pickle
import re
import struct
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mambakit._files import read_text

from .layouts.layout import PICKLED, SAFETENSORS

WEIGHTS = tuple(
    name + index for name in (SAFETENSORS, PICKLED) for index in ("", ".index.json")
)
"""Names under which a folder holds its weights, in the order in which they are looked for."""

# What torch.load was seen to raise at 3,000 damaged files.
_UNREADABLE = (
    pickle.UnpicklingError,
    RuntimeError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    EOFError,
    OverflowError,
    struct.error,
)


def find_weights(folder: Path) -> Path:
    """Return the file with the weights, or with the index of their shards.

    Raises:
        ValueError: There is none.
    """
    for name in WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    raise ValueError(
        f"load: there is no file {folder / WEIGHTS[0]}, and neither {', '.join(WEIGHTS[1:])}"
    )


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Map the tensors of a file, or of all shards that an index names, into memory.

    The tensors read the files when they are used. Nothing in a file is ever executed.

    Raises:
        ValueError: A file is missing, truncated, damaged, or no file of tensors.
    """
    if path.suffix != ".json":
        return _read_file(path)
    tensors: dict[str, Tensor] = {}
    for shard in read_index(path):
        part = _read_file(path.parent / shard)
        if twice := sorted(tensors.keys() & part.keys()):
            raise ValueError(
                f"load: {path} must name shards that hold each tensor once, but {shard} "
                f"repeats {twice[0]}"
            )
        tensors |= part
    return tensors


def read_index(path: Path) -> list[str]:
    """Return the names of the shards that an index names, each once.

    Raises:
        ValueError: The file is no index, or names a file outside its folder.
    """
    index = read_object(path, "index of weights")
    files = index.get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(f, str) for f in files.values()):
        raise ValueError(f"load: {path} must map names of tensors to files in weight_map")
    for file in files.values():
        if file in ("", ".", "..") or re.search(r"[/\\]", file):
            raise ValueError(f"load: {path} must name files beside it, got {file!r}")
    return sorted(set(files.values()))


def read_object(path: Path, what: str) -> dict[str, Any]:
    """Read a JSON object; ``what`` says what it is.

    Raises:
        ValueError: The file cannot be read or holds something else.
    """
    text = read_text(path, what)
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"load: {path} must be JSON, got {error.msg} at line {error.lineno}"
        ) from error
    except (ValueError, RecursionError) as error:  # numbers too long, brackets too deep
        raise ValueError(f"load: {path} must be JSON, got {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"load: {path} must be a JSON object, got {type(values).__name__}")
    return values


def _read_file(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ValueError(f"load: there is no file {path}")
    return _read_pickled(path) if path.suffix == ".bin" else _read_safetensors(path)


def require_readable(path: Path) -> None:
    """Check that a file may be read, of which safetensors would say that it is not there.

    Raises:
        ValueError: It may not.
    """
    try:
        path.open("rb").close()
    except OSError as error:
        raise ValueError(f"load: cannot read {path}: {error.strerror or error}") from error


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    require_readable(path)
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"load: {path} must be a whole safetensors file, but it is truncated or damaged "
            f"({error})"
        ) from error


def _read_pickled(path: Path) -> dict[str, Tensor]:
    try:
        # only the zip format, torch's default since 1.6, can be mapped
        mapped = zipfile.is_zipfile(path)
        tensors = torch.load(path, map_location="cpu", mmap=mapped, weights_only=True)
    except OSError as error:
        raise ValueError(f"load: cannot read {path}: {error.strerror or error}") from error
    except _UNREADABLE as error:
        asked = re.search(r"GLOBAL (\S+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and asked:
            raise ValueError(
                f"load: {path} must hold tensors and nothing else, got a pickle that asks for "
                f"{asked[1]}; it was not executed"
            ) from error
        raise ValueError(
            f"load: {path} must be a whole file of torch.save, but it is truncated, damaged or "
            "another kind of file"
        ) from error
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in tensors.items()
    ):
        raise ValueError(f"load: {path} must hold a dictionary of names to tensors")
    for name, tensor in tensors.items():
        if (kind := _odd_kind(tensor)) is not None:
            raise ValueError(
                f"load: {path} must hold dense tensors with their values, got {kind}: {name}"
            )
    return tensors


def _odd_kind(tensor: Tensor) -> str | None:
    """Say what a tensor is that is no dense one with values; safetensors knows no other."""
    if tensor.is_nested:
        return "a nested one"
    if tensor.layout is not torch.strided:
        return f"one of layout {str(tensor.layout).removeprefix('torch.')}"
    return "one on meta, without values" if tensor.is_meta else None


def write_tensors(tensors: dict[str, Tensor], path: Path, *, pickled: bool) -> None:
    """Write tensors by ``torch.save`` or as safetensors."""
    if pickled:
        with path.open("wb") as file:  # of a path, torch would lose the reason of a failure
            torch.save(tensors, file)
    else:
        save_file(tensors, path, metadata={"format": "pt"})
