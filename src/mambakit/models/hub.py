"""Checkpoints on the Hugging Face Hub: from an id to a folder of its cache."""

import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .weights import WEIGHTS, read_index

TOKENIZER = "tokenizer.json"
_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)


def locate(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    local_files_only: bool = False,
) -> Path:
    """Return the folder of a checkpoint: itself, or that of a Hub id in the Hub's cache.

    A string of the form ``owner/name`` that names no folder here is a Hub id. Its config, one
    set of weights and its ``tokenizer.json``, if it has one, are fetched unless the cache holds
    them; without a network, or where ``HF_HUB_OFFLINE`` says so, the cache must hold config and
    weights.

    Args:
        source: A folder or a Hub id.
        revision: Branch, tag or commit on the Hub; ``None`` means its main branch.
        local_files_only: Use the cache and no network.

    Raises:
        ValueError: There is no such folder, nor such a repository or revision on the Hub, or
            the repository holds no weights.
        RuntimeError: The Hub cannot be reached, does not let you in or fails; or
            ``huggingface_hub`` is not installed.

    Example:
        >>> locate("no/such/folder")
        Traceback (most recent call last):
        ...
        ValueError: from_pretrained: there is no folder no/such/folder
    """
    if Path(source).exists():
        if revision is not None:
            raise ValueError(
                f"from_pretrained: revision must be None for a folder, got {revision!r} "
                f"for {source}"
            )
        return Path(source)
    if not isinstance(source, str) or not _ID.fullmatch(source):
        raise ValueError(f"from_pretrained: there is no folder {source}")
    return _fetch(source, revision, local_files_only)


def _fetch(repository: str, revision: str | None, local_files_only: bool) -> Path:
    try:
        from huggingface_hub import errors, hf_hub_download
    except ImportError as error:
        raise RuntimeError(
            f"from_pretrained: there is no folder {repository}, and to look for it on the Hub "
            "needs huggingface_hub: pip install 'mambakit[hub]'"
        ) from error

    unreachable: list[Exception] = []

    def fetch(name: str, revision: str | None) -> Path:
        try:
            path = hf_hub_download(
                repository,
                name,
                revision=revision,
                # without a network, one long wait for it is enough
                local_files_only=local_files_only or bool(unreachable),
            )
        except errors.LocalEntryNotFoundError as error:
            unreachable.append(error)
            raise unreachable[0] from unreachable[0].__cause__
        return Path(path)

    with _explained(errors, repository, revision):
        folder = fetch("config.json", revision).parent
        commit = folder.name  # all files must be of the same one
        *others, last = WEIGHTS
        for name in others:
            try:
                weights = fetch(name, commit)
                break
            except errors.EntryNotFoundError:
                continue  # most repositories hold one of these names only
        else:
            weights = fetch(last, commit)
        if weights.suffix == ".json":
            for shard in read_index(weights):
                fetch(shard, commit)
        try:
            fetch(TOKENIZER, commit)
        except errors.LocalEntryNotFoundError as error:
            # the cache may be older than this line, and the model is there
            cause = error.__cause__
            if cause is not None and not isinstance(cause, errors.OfflineModeIsEnabled):
                warnings.warn(
                    f"from_pretrained: {repository} comes without its {TOKENIZER}, if it has "
                    f"one: the Hub cannot be reached ({_first_line(cause)})",
                    stacklevel=4,
                )
        except errors.EntryNotFoundError:
            pass  # a model may come without one
        return folder


@contextmanager
def _explained(errors: Any, repository: str, revision: str | None) -> Iterator[None]:
    """Turn what huggingface_hub raises into one sentence; the Hub's own is the cause."""
    try:
        yield
    except errors.GatedRepoError as error:
        raise RuntimeError(
            f"from_pretrained: {repository} is only open to those who accepted its terms: do "
            "so on the Hub, then log in with `hf auth login`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ValueError(
            f"from_pretrained: there is no folder {repository}, and no model of this name on "
            "the Hub that is public or that you have access to"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ValueError(
            f"from_pretrained: {repository} on the Hub has no revision {revision!r}"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        if error.__cause__ is None:
            reason = "local_files_only rules out the network"
        elif isinstance(error.__cause__, errors.OfflineModeIsEnabled):
            reason = "HF_HUB_OFFLINE rules out the network"
        else:
            reason = f"the Hub cannot be reached ({_first_line(error.__cause__)})"
        raise RuntimeError(
            f"from_pretrained: there is no folder {repository}, the Hub's cache does not hold "
            f"a model of this name, or not all of it, and {reason}"
        ) from error
    except errors.EntryNotFoundError as error:
        raise ValueError(
            f"from_pretrained: {repository} on the Hub must hold config.json and one of "
            f"{', '.join(WEIGHTS)}, with all shards that it names, but it does not"
        ) from error
    except errors.HFValidationError as error:
        raise ValueError(
            f"from_pretrained: there is no folder {repository}, and it is no Hub id either"
        ) from error
    # HTTPError is that of the client library, which differs between versions
    except (errors.HTTPError, OSError) as error:
        raise RuntimeError(
            f"from_pretrained: cannot fetch {repository} from the Hub: {_first_line(error)}"
        ) from error


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
