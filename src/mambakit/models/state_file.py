"""A state in a file: safetensors, with the sizes of its model beside the tensors."""

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mambakit._files import replacing
from mambakit.modules import MixerState

from .config import MambaConfig
from .weights import require_readable

_FORMAT = "mambakit.ModelState"
_SIZES = ("n_layer", "d_inner", "d_state", "d_conv")


def write_layers(
    path: str | os.PathLike[str],
    layers: tuple[MixerState, ...],
    extra: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the states of all layers, and tensors that belong to them, whole or not at all.

    Raises:
        RuntimeError: The file cannot be written; the message says why.
    """
    tensors = dict(extra or {})
    for i, layer in enumerate(layers):
        tensors |= {f"layers.{i}.{name}": part for name, part in layer._asdict().items()}
    # forks and slices share memory, and a file wants each tensor to own its own
    owned = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    sizes = {name: str(size) for name, size in _sizes(layers).items()}
    with replacing(Path(path)) as temporary:
        save_file(owned, temporary, metadata={"format": _FORMAT, "version": "1", **sizes})


def read_layers(
    path: str | os.PathLike[str],
    device: torch.device | str | None = "cpu",
    config: MambaConfig | None = None,
) -> tuple[tuple[MixerState, ...], dict[str, Tensor]]:
    """Read what ``write_layers`` wrote: the layers' states, and the other tensors by name.

    Raises:
        ValueError: The file is missing, damaged or holds something else, or its state is not of
            the sizes that ``config`` has.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"load: there is no file {path}")
    require_readable(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"load: {path} must be a whole safetensors file, but it is truncated or damaged "
            f"({error})"
        ) from error
    if (metadata.get("format"), metadata.get("version")) != (_FORMAT, "1"):
        raise ValueError(f"load: {path} must hold a state of a model, got another kind of file")

    found = {name: metadata.get(name, "") for name in _SIZES}
    if config is not None:
        wanted = {name: str(getattr(config, name)) for name in _SIZES}
        if found != wanted:
            raise ValueError(
                f"load: {path} must hold a state of a model with {_words(wanted)}, "
                f"got one of a model with {_words(found)}"
            )
    count = sum(name.endswith(".ssm") for name in tensors)
    names = [f"layers.{i}.{part}" for i in range(count) for part in MixerState._fields]
    if device is None:
        device = torch.get_default_device()
    # a copy, because what the file gives is a view of the mapped file
    owned = {name: tensor.to(device=device, copy=True) for name, tensor in tensors.items()}
    parts = [owned.pop(name, None) for name in names]
    layers = tuple(map(MixerState, parts[::2], parts[1::2]))
    if not _fit(layers, found):
        raise ValueError(f"load: {path} must hold the layers' states of {_words(found)}")
    return layers, owned


def _fit(layers: tuple[MixerState, ...], sizes: Mapping[str, str]) -> bool:
    """Tell whether all parts are there, of one number of sequences and of these sizes."""
    parts = [part for layer in layers for part in layer]
    if not parts or any(part is None or part.ndim != 3 for part in parts):
        return False
    alike = {tuple(part.shape for part in layer) for layer in layers}
    (conv, ssm) = layers[0]
    return (
        len(alike) == 1
        and conv.shape[:2] == ssm.shape[:2]
        and {name: str(size) for name, size in _sizes(layers).items()} == sizes
    )


def _sizes(layers: tuple[MixerState, ...]) -> dict[str, int]:
    _, d, n = layers[0].ssm.shape
    w = layers[0].conv.shape[2] + 1
    return dict(zip(_SIZES, (len(layers), d, n, w), strict=True))


def _words(sizes: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {size or 'unknown'}" for name, size in sizes.items())
