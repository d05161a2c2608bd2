"""Laws of writing: a target is whole or as it was."""

import errno
import os
import stat

import pytest
import torch
from safetensors.torch import save_file

from mambakit._files import read_text, replacing, require_writable, sweep


def test_an_error_leaves_the_old_file_and_no_rubbish(tmp_path):
    target = tmp_path / "file"
    target.write_text("old")

    def write_half():
        with replacing(target) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_cannot_be_written_is_known_before(tmp_path):
    (tmp_path / "file").touch()
    for target, words in (
        (tmp_path / "file" / "below", "Not a directory"),
        (tmp_path / "file" / "far" / "below", "Not a directory"),
        (tmp_path, "it is a folder"),
        (tmp_path / "..", "it names no file"),
    ):
        with pytest.raises(RuntimeError, match=rf"^cannot write .*{target.name}: {words}$"):
            require_writable(target)


def test_what_can_be_written_is_left_as_it_is(tmp_path):
    (tmp_path / "file").write_text("old")
    require_writable(tmp_path / "file")
    require_writable(tmp_path / "new" / "folder" / "file")
    assert [path.name for path in tmp_path.rglob("*")] == ["file"]
    assert (tmp_path / "file").read_text() == "old"


def test_a_folder_appears_whole(tmp_path):
    with replacing(tmp_path / "deep" / "folder") as temporary:
        temporary.mkdir()
        (temporary / "a").write_text("1")
        assert not (tmp_path / "deep" / "folder").exists()
    assert (tmp_path / "deep" / "folder" / "a").read_text() == "1"


@pytest.fixture(params=[0o022, 0o002, 0o077], ids=oct)
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.mark.skipif(os.name != "posix", reason="files have no such permissions here")
@pytest.mark.parametrize("old", [None, 0o600, 0o666])
def test_files_have_the_permissions_of_new_ones(tmp_path, umask, old):
    file, folder = tmp_path / "file", tmp_path / "folder"
    if old is not None:
        file.touch()
        file.chmod(old)
    with replacing(file) as temporary:
        save_file({"a": torch.zeros(2)}, temporary)
    with replacing(folder) as temporary:
        (temporary / "below").mkdir(parents=True)
        save_file({"a": torch.zeros(2)}, temporary / "below" / "a")
        (temporary / "b").touch()
    plain = 0o666 & ~umask
    for path in (file, folder / "below" / "a", folder / "b"):
        assert stat.S_IMODE(path.stat().st_mode) == plain, path
    for path in (folder, folder / "below"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o777 & ~umask, path
    assert {path.name for path in tmp_path.iterdir()} == {"file", "folder"}


def test_a_full_disk_is_one_sentence(tmp_path):
    def write():
        with replacing(tmp_path / "file"):
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(RuntimeError, match=r"cannot write .*file: No space left on device$"):
        write()
    assert list(tmp_path.iterdir()) == []


def test_a_place_below_a_file_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("in the way")

    def write():
        with replacing(tmp_path / "file" / "inside") as temporary:
            temporary.write_text("never")

    with pytest.raises(RuntimeError, match=r"cannot write .*inside: "):
        write()


def test_sweep_removes_leftovers_only(tmp_path):
    (tmp_path / ".file.123.tmp").write_text("half")
    (tmp_path / ".folder.123.tmp").mkdir()
    (tmp_path / "file").write_text("whole")
    sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_reading_names_the_file_and_the_byte(tmp_path):
    (tmp_path / "file").write_bytes(b"ab\xff")
    with pytest.raises(ValueError, match=r"config .*file must be UTF-8.*0xff at offset 2"):
        read_text(tmp_path / "file", "config")
    with pytest.raises(ValueError, match=r"cannot read config .*none: No such file"):
        read_text(tmp_path / "none", "config")


@pytest.mark.skipif(os.name != "posix", reason="folders cannot be opened here")
def test_the_new_name_reaches_the_disk_after_the_contents(tmp_path, monkeypatch):
    done = []
    fsync, rename = os.fsync, os.replace

    def note_fsync(descriptor):
        done.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def note_rename(one, other):
        done.append("rename")
        rename(one, other)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_rename)
    with replacing(tmp_path / "folder") as temporary:
        temporary.mkdir()
        (temporary / "a").write_text("1")
    folder = tmp_path / "folder"
    inodes = [path.stat().st_ino for path in (folder / "a", folder, tmp_path)]
    assert done == [inodes[0], inodes[1], "rename", inodes[2]]


def test_a_file_system_that_cannot_sync_folders_is_no_error(tmp_path, monkeypatch):
    fsync = os.fsync

    def refuse_folders(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse_folders)
    with replacing(tmp_path / "file") as temporary:
        temporary.write_text("whole")
    assert (tmp_path / "file").read_text() == "whole"
