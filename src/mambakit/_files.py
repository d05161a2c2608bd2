"""Files and folders that are there whole or not at all."""

import errno
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


def sync(path: Path) -> None:
    """Push a file, or a folder with all that it holds, out to the disk."""
    if path.is_file():
        with path.open("rb+") as handle:
            os.fsync(handle.fileno())
        return
    for entry in path.iterdir():
        sync(entry)
    _sync_names(path)


def _sync_names(folder: Path) -> None:
    """Push the names of a folder's entries out to the disk; a rename is such a name."""
    if os.name != "posix":  # elsewhere a folder cannot be opened
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # how a file system says that it has no such operation for folders
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(descriptor)


def _mode_of_new(path: Path) -> int:
    """Return the permissions of a file that ``open`` makes at ``path``, where there is none.

    The umask can only be asked for by setting it, which another thread's files would notice;
    and it is not all: folders may have rules of their own. A file that is made says both.
    """
    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)
    path.unlink()
    return mode


def _permit(path: Path, mode: int) -> None:
    """Give a file, or every file of a folder, these permissions where it has others."""
    if path.is_dir():
        for entry in path.iterdir():
            _permit(entry, mode)
    elif stat.S_IMODE(path.stat().st_mode) != mode:
        path.chmod(mode)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Give a temporary path beside ``target`` that takes its place when the block ends.

    The caller writes a file, or makes a folder, at the path given. A process killed at
    any moment, or a disk that fills up, leaves whatever was at ``target`` as it was.
    A folder can only be new: one that exists is never overwritten. All files get the
    permissions of new ones, as ``open`` would make them at ``target``.

    Args:
        target: The path that is to exist whole or not at all.

    Raises:
        RuntimeError: The operating system refused; the sentence names ``target`` and
            the reason.

    Example:
        >>> import tempfile
        >>> target = Path(tempfile.mkdtemp()) / "notes.txt"
        >>> with replacing(target) as temporary:
        ...     _ = temporary.write_text("whole")
        >>> target.read_text()
        'whole'
    """
    _require_place(target)
    # the process id keeps two processes that share a cache out of each other's way
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove(temporary)
        mode = _mode_of_new(temporary)
        yield temporary
        # safetensors leaves files that only their owner may read. The permissions of a file
        # that is replaced go with it: this one is new.
        _permit(temporary, mode)
        sync(temporary)
        os.replace(temporary, target)
        _sync_names(target.parent)
    except OSError as error:
        raise RuntimeError(f"cannot write {target}: {error.strerror or error}") from error
    except SafetensorError as error:
        raise RuntimeError(f"cannot write {target}: {error}") from error
    finally:
        if temporary.exists():
            _remove(temporary)


def _require_place(target: Path) -> None:
    if target.name in ("", ".."):
        raise RuntimeError(f"cannot write {target}: it names no file")
    if target.exists() and not (target.is_file() or target.is_dir()):
        raise RuntimeError(f"cannot write {target}: it is a device or a pipe, not a file")


def require_writable(target: Path) -> None:
    """Refuse a file that cannot be written, before anybody works for it; leave no trace.

    Raises:
        RuntimeError: As ``replacing``, as far as can be known.
    """
    _require_place(target)
    if target.is_dir():
        raise RuntimeError(f"cannot write {target}: it is a folder")
    folder = target.parent
    while not os.path.lexists(folder) and folder != folder.parent:
        folder = folder.parent  # ``replacing`` makes what is missing below
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise RuntimeError(f"cannot write {target}: {error.strerror or error}") from error


def sweep(folder: Path) -> None:
    """Remove what a killed process left behind in ``folder`` on its way to a target."""
    for leftover in folder.glob(".*.tmp"):
        _remove(leftover)


def read_text(path: Path, what: str) -> str:
    """Read a UTF-8 file, or raise one sentence that names it and says ``what`` it is.

    Raises:
        ValueError: The file is missing, cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"cannot read {what} {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{what} {path} must be UTF-8, got the byte 0x{error.object[error.start]:02x} "
            f"at offset {error.start}"
        ) from error
