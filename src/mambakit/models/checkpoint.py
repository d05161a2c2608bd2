"""A model on disk: a folder of ``model.safetensors`` and ``config.json``."""

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mambakit._files import read_text, replacing, sync
from mambakit.ops._backends import Backend

from .config import MambaConfig
from .language import MambaLM

WEIGHTS = "model.safetensors"
CONFIG = "config.json"

_NAMES_SHOWN = 20


def save(model: MambaLM, folder: str | Path) -> None:
    """Write a model to ``folder``, which is made if it is not there.

    Both files are whole and on the disk before either takes its name, so an interruption, a
    full disk or a refusal leaves the model that was there before. Only a process killed between
    the two renames leaves new weights beside an old config. A tied matrix is written once.
    Tensors keep their dtypes.

    Raises:
        RuntimeError: The folder cannot be written; the message says why.

    Example:
        >>> import tempfile
        >>> from mambakit import MambaConfig, MambaLM
        >>> model = MambaLM(MambaConfig(d_model=16, n_layer=1, vocab_size=32))
        >>> folder = tempfile.mkdtemp()
        >>> save(model, folder)
        >>> tokens = torch.arange(5)[None]
        >>> torch.equal(load(folder)(tokens).logits, model(tokens).logits)
        True
    """
    folder = Path(folder)
    tensors = {
        name: parameter.detach().contiguous() for name, parameter in model.named_parameters()
    }
    with replacing(folder / CONFIG) as config:
        config.write_text(json.dumps(model.config.to_dict(), indent=2) + "\n", encoding="utf-8")
        sync(config)
        with replacing(folder / WEIGHTS) as weights:
            save_file(tensors, weights, metadata={"format": "pt"})


def load(
    folder: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    *,
    backend: Backend = "auto",
) -> MambaLM:
    """Read a model that ``save`` has written.

    Args:
        folder: Where it is.
        device: Where the parameters go.
        dtype: Dtype to convert them to; ``None`` means each parameter's dtype in the file. Each
            mixer's ``A_log``, ``D`` and the bias of its ``dt_proj`` come back in at least
            float32 all the same.
        backend: As in ``MambaLM``.

    Raises:
        ValueError: A file is missing, truncated or not what its name says; or the names or
            shapes in it are not the config's: missing, unexpected and mis-shaped ones are
            listed together.
    """
    folder = Path(folder)
    config = _read_config(folder / CONFIG)
    model = MambaLM(config, backend=backend, device="meta", dtype=dtype)
    _replace_parameters(model, _read_tensors(folder / WEIGHTS, model), device, dtype)
    return model


def _read_config(path: Path) -> MambaConfig:
    text = read_text(path, "config")
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"load: {path} must be JSON, got {error.msg} at line {error.lineno}"
        ) from error
    if not isinstance(values, dict):
        raise ValueError(f"load: {path} must be a JSON object, got {type(values).__name__}")
    try:
        return MambaConfig.from_dict(values)
    except ValueError as error:
        raise ValueError(f"load: {path} is not a config of this model: {error}") from error


def _read_tensors(path: Path, model: MambaLM) -> dict[str, Tensor]:
    """Read the tensors that the parameters name, after checking that all of them fit."""
    if not path.is_file():
        raise ValueError(f"load: there is no file {path}")
    wanted = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            found = {name: tuple(file.get_slice(name).get_shape()) for name in names}
            complaints = [
                *_complaint("missing", (name for name in wanted if name not in found)),
                *_complaint("unexpected", (name for name in found if name not in wanted)),
                *_complaint(
                    "of another shape",
                    (
                        f"{name} {found[name]} instead of {shape}"
                        for name, shape in wanted.items()
                        if name in found and found[name] != shape
                    ),
                ),
            ]
            if complaints:
                raise ValueError(
                    f"load: {path} does not fit the config beside it: {'; '.join(complaints)}"
                )
            return {name: file.get_tensor(name) for name in wanted}
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"load: {path} must be a whole safetensors file, but it is truncated or damaged "
            f"({error})"
        ) from error


def _complaint(what: str, names: Iterable[str]) -> list[str]:
    every = list(names)
    if not every:
        return []
    shown = ", ".join(every[:_NAMES_SHOWN])
    rest = f" and {len(every) - _NAMES_SHOWN} more" if len(every) > _NAMES_SHOWN else ""
    return [f"{what}: {shown}{rest}"]


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
            if not tensor.is_floating_point():
                raise ValueError(f"load: {name} must be floating point, got {tensor.dtype}")
            # A copy, because what safetensors gives is a view of the mapped file.
            to = tensor.dtype if dtype is None else old.dtype
            new = nn.Parameter(torch.empty_like(tensor, device=device, dtype=to).copy_(tensor))
            new.__dict__.update(old.__dict__)
            replaced[old] = new
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, replaced[old])
    if dtype is None:
        model._apply(lambda tensor: tensor)
