"""A model on disk: a folder of weights and ``config.json``, in one of three layouts."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from mambakit._files import replacing, sync
from mambakit.ops._backends import Backend

from .config import MambaConfig
from .language import MambaLM
from .layouts import LAYOUTS, Layout, recognise
from .layouts.layout import PICKLED
from .weights import WEIGHTS, find_weights, read_object, read_tensors, write_tensors

CONFIG = "config.json"

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_EMBEDDING, _HEAD = "backbone.embedding.weight", "lm_head.weight"
_NAMES_SHOWN = 20


def save(
    model: MambaLM,
    folder: str | os.PathLike[str],
    *,
    layout: Literal["mambakit", "hf", "mamba_ssm"] = "mambakit",
) -> None:
    """Write a model to ``folder``, which is made if it is not there.

    Both files are whole and on the disk before either takes its name, so an interruption, a
    full disk or a refusal leaves the model that was there before. Only a process killed between
    the two renames leaves new weights beside an old config. A tied matrix is written once.
    Tensors keep their dtypes and every bit.

    Args:
        model: The model.
        folder: Where to write it.
        layout: ``"mambakit"`` and ``"hf"`` write ``model.safetensors``, ``"mamba_ssm"``
            writes ``pytorch_model.bin``; each writes its own ``config.json``. Transformers
            reads ``"hf"``, and the authors' ``mamba_ssm`` reads ``"mamba_ssm"``.

    Raises:
        ValueError: There is no such layout, it has no words for this model, or the folder
            holds weights under another name, which would be read in the place of these.
        RuntimeError: The folder cannot be written; the message says why.

    Example:
        >>> import tempfile
        >>> from mambakit import MambaConfig, MambaLM
        >>> model = MambaLM(MambaConfig(d_model=16, n_layer=1, vocab_size=32))
        >>> folder = tempfile.mkdtemp()
        >>> save(model, folder, layout="hf")
        >>> tokens = torch.arange(5)[None]
        >>> torch.equal(load(folder)(tokens).logits, model(tokens).logits)
        True
    """
    folder = Path(folder)
    if layout not in LAYOUTS:
        raise ValueError(f"save: layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    words = LAYOUTS[layout]
    dtype = model.backbone.embedding.weight.dtype
    try:
        values = words.write_config(model.config, dtype)
    except ValueError as error:
        raise ValueError(
            f"save: the layout {layout!r} cannot hold this model: {error}"
        ) from error
    others = [name for name in WEIGHTS if name != words.weights and (folder / name).exists()]
    if others:
        raise ValueError(
            f"save: {folder} must hold no other weights, got {', '.join(others)}: "
            "choose another folder"
        )

    tensors = {
        words.their_name(name): _alone(parameter)
        for name, parameter in model.named_parameters()
    }
    if model.config.tie_embeddings and words.repeats_tied:
        tensors[words.their_name(_HEAD)] = tensors[words.their_name(_EMBEDDING)]
    with replacing(folder / CONFIG) as config:
        config.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        sync(config)
        with replacing(folder / words.weights) as weights:
            write_tensors(tensors, weights, pickled=words.weights == PICKLED)


def _alone(parameter: nn.Parameter) -> Tensor:
    """Return the parameter on the CPU, as the only owner of its memory: a file takes it all."""
    tensor = parameter.detach().cpu().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def load(
    folder: str | os.PathLike[str],
    device: torch.device | str | None = "cpu",
    dtype: torch.dtype | None = None,
    *,
    backend: Backend = "auto",
) -> MambaLM:
    """Read a model in any of the layouts that ``save`` writes; its files tell which.

    Weights are looked for as ``model.safetensors``, its shards, ``pytorch_model.bin`` and its
    shards, in this order. Nothing in a ``.bin`` file is executed.

    Args:
        folder: Where it is.
        device: Where the parameters go; ``None`` means torch's default.
        dtype: Dtype to convert them to; ``None`` means each parameter's dtype in the file. Each
            mixer's ``A_log``, ``D`` and the bias of its ``dt_proj`` come back in at least
            float32 all the same.
        backend: As in ``MambaLM``.

    Raises:
        ValueError: A file is missing, truncated or not what its name says; the config is of a
            model that this package does not have; or the names, shapes or dtypes of the tensors
            are not the config's: all that do not fit are listed together.
    """
    folder = Path(folder)
    if dtype is not None and dtype not in _DTYPES:
        raise ValueError(f"load: dtype must be float64, 32, 16 or bfloat16, got {dtype}")
    if not folder.is_dir():
        kind = "a file" if folder.exists() else "nothing"
        raise ValueError(f"load: {folder} must be a folder, got {kind}")
    words, config = _read_config(folder / CONFIG)
    path = find_weights(folder)
    # As a probe, bfloat16 tells the parameters that are to stay in at least float32.
    model = MambaLM(config, backend=backend, device="meta", dtype=dtype or torch.bfloat16)
    tensors = _matched(read_tensors(path), model, words, path)
    if dtype is None:
        _require_one_dtype(tensors, model, path)
    if device is None:
        device = torch.get_default_device()
    _replace_parameters(model, tensors, device, dtype)
    return model


def _read_config(path: Path) -> tuple[Layout, MambaConfig]:
    values = read_object(path, "config")
    words = recognise(values)
    try:
        return words, words.read_config(values)
    except ValueError as error:
        raise ValueError(f"load: {path} is not a config of this model: {error}") from error


def _matched(
    tensors: dict[str, Tensor], model: MambaLM, words: Layout, path: Path
) -> dict[str, Tensor]:
    """Return the parameters' tensors by our names, after checking that all of them fit."""
    wanted = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    found: dict[str, Tensor] = {}
    unexpected = []
    for name, tensor in tensors.items():
        ours = words.our_name(name)
        if ours in found or ours not in {*wanted, _HEAD}:
            unexpected.append(name)
        else:
            found[ours] = tensor

    tied = model.config.tie_embeddings
    if tied and _HEAD in found:
        head = found.pop(_HEAD)
        if not torch.equal(found.setdefault(_EMBEDDING, head), head):
            raise ValueError(
                f"load: {path} must hold one matrix for embedding and output, as the config "
                f"beside it says, but {_HEAD} and {words.their_name(_EMBEDDING)} differ"
            )
    complaints = [
        *_complaint("missing", (words.their_name(n) for n in wanted if n not in found)),
        *_complaint("unexpected", unexpected),
        *_complaint(
            "of another shape",
            (
                f"{words.their_name(name)} {tuple(tensor.shape)} instead of {wanted[name]}"
                for name, tensor in found.items()
                if tuple(tensor.shape) != wanted[name]
            ),
        ),
        *_complaint(
            "of a dtype that weights cannot have",
            (
                f"{words.their_name(name)} {_short(tensor.dtype)}"
                for name, tensor in found.items()
                if tensor.dtype not in _DTYPES
            ),
        ),
    ]
    if complaints:
        raise ValueError(
            f"load: {path} does not fit the config beside it: {'; '.join(complaints)}"
        )
    return {name: found[name] for name in wanted}


def _complaint(what: str, names: Iterable[str]) -> list[str]:
    every = list(names)
    if not every:
        return []
    shown = ", ".join(every[:_NAMES_SHOWN])
    rest = f" and {len(every) - _NAMES_SHOWN} more" if len(every) > _NAMES_SHOWN else ""
    return [f"{what}: {shown}{rest}"]


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _require_one_dtype(tensors: dict[str, Tensor], model: MambaLM, path: Path) -> None:
    """Refuse a mixture, of which the layers' products would complain later."""
    first: dict[torch.dtype, str] = {}
    for name, parameter in model.named_parameters():
        if parameter.dtype == torch.bfloat16:  # the probe's: not one of those kept wide
            first.setdefault(tensors[name].dtype, name)
    if len(first) > 1:
        kinds = ", ".join(f"{_short(dtype)} ({name})" for dtype, name in first.items())
        raise ValueError(
            f"load: {path} must hold weights of one dtype, got {kinds}: choose with dtype="
        )


def _replace_parameters(
    model: nn.Module,
    tensors: dict[str, Tensor],
    device: torch.device | str,
    dtype: torch.dtype | None,
) -> None:
    """Put ``tensors`` in the place of a meta model's parameters, ties and marks kept."""
    replaced: dict[nn.Parameter, nn.Parameter] = {}
    for name, old in list(model.named_parameters(remove_duplicate=False)):
        if old not in replaced:
            tensor = tensors[name]
            # A copy, because what the files give is a view of the mapped file.
            to = tensor.dtype if dtype is None else old.dtype
            new = nn.Parameter(torch.empty(tensor.shape, device=device, dtype=to).copy_(tensor))
            new.__dict__.update(old.__dict__)
            replaced[old] = new
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, replaced[old])
    if dtype is None:
        model._apply(lambda tensor: tensor)
