"""Laws of finding and dividing text: nothing is lost, nothing is in two parts."""

import os

import pytest
from hypothesis import given, settings, strategies as st

from mambakit.data import (
    Document,
    find_documents,
    split_by_file,
    split_by_position,
    standard_library,
)


def write(folder, **files):
    for name, content in files.items():
        path = folder / name.replace("__", "/").replace("_txt", ".txt").replace("_md", ".md")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)


def test_a_folder_is_searched_through_in_order_of_names(tmp_path):
    write(tmp_path, b_txt="1", a__z_txt="2", a__y_md="3", empty_txt="")
    assert [d.name for d in find_documents([str(tmp_path)])] == ["a/z.txt", "b.txt"]
    both = find_documents([str(tmp_path)], ["*.md", "*.txt"])
    assert [d.name for d in both] == ["a/y.md", "a/z.txt", "b.txt"]


def test_files_and_globs_are_places_too(tmp_path):
    write(tmp_path, b_txt="1", a__z_txt="22", a__y_md="3")
    found = find_documents([str(tmp_path / "b.txt"), str(tmp_path / "**" / "*.md")])
    assert [d.name for d in found] == ["b.txt", "y.md"]
    assert [d.read() for d in found] == [b"1", b"3"]


@pytest.mark.parametrize(
    ("place", "sentence"),
    [
        ("missing.txt", "there is no file or folder"),
        ("empty.txt", "must hold text, got an empty file"),
        ("folder", r"must hold files named \*\.txt, got none"),
        ("*.none", "must match a file, got none"),
        ("blank", "got only empty files"),
    ],
)
def test_a_place_without_text_is_named(tmp_path, place, sentence):
    write(tmp_path, empty_txt="", folder__a_md="1", blank__a_txt="")
    with pytest.raises(ValueError, match=sentence) as refusal:
        find_documents([str(tmp_path / place)])
    assert place in str(refusal.value)


def test_a_folder_of_which_every_file_counts_must_hold_one(tmp_path):
    (tmp_path / "folder" / "below").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"the folder .*folder must hold files, got none$"):
        find_documents([str(tmp_path / "folder")], ["*"])


def test_a_file_that_shrank_is_named(tmp_path):
    write(tmp_path, a_txt="12345")
    (document,) = find_documents([str(tmp_path / "a.txt")])
    write(tmp_path, a_txt="12")
    with pytest.raises(ValueError, match=r"a\.txt must hold at least 5 bytes, got 2"):
        document.read()


def test_a_byte_that_is_not_utf8_is_named_by_its_place_in_the_file(tmp_path):
    write(tmp_path, a_txt=b"good\xfftext")
    part = Document("a.txt", tmp_path / "a.txt", 2, 9)
    with pytest.raises(
        ValueError, match=r"a\.txt must be UTF-8, got the byte 0xff at offset 4"
    ):
        part.read_text()


def test_the_standard_library_is_there_and_has_no_tests():
    documents = standard_library()
    names = [document.name for document in documents]
    assert "textwrap.py" in names
    assert names == sorted(names)
    assert not any("test" in name.split("/")[:-1] for name in names)
    assert not any("site-packages" in name for name in names)


def files(count):
    return [Document(f"folder/{i}.txt", None, 0, 1) for i in range(count)]


def test_a_file_belongs_to_one_part_whatever_the_others_are():
    documents = files(400)
    whole = split_by_file(documents, 0.1, 0.2)
    assert sorted(sum(whole, ()), key=id) == sorted(documents, key=id)
    half = split_by_file(documents[::2], 0.1, 0.2)
    for part, smaller in zip(whole, half, strict=True):
        assert set(smaller) == set(part) & set(documents[::2])


def test_parts_by_file_have_about_their_shares():
    train, validation, test = split_by_file(files(2000), 0.1, 0.2)
    assert 150 < len(validation) < 250
    assert 330 < len(test) < 470
    assert len(train) + len(validation) + len(test) == 2000


def test_a_part_that_gets_no_file_is_named():
    with pytest.raises(ValueError, match=r"give the \w+ split a file.*split = 'position'"):
        split_by_file(files(2), 0.1, 0.1)


@pytest.mark.parametrize("shares", [(-0.1, 0.1), (0.5, 0.5), (float("nan"), 0.1)])
@pytest.mark.parametrize("split", [split_by_file, split_by_position])
def test_shares_that_are_none_are_refused(split, shares):
    with pytest.raises(ValueError, match="must be shares of the text"):
        split(files(10), *shares)


def test_the_convention_for_one_text_is_exact(tmp_path):
    data = bytes(range(32, 127)) * 11
    write(tmp_path, a_txt=data)
    train, validation, test = split_by_position(find_documents([str(tmp_path)]), 0.1, 0)
    assert train[0].read() == data[: int(0.9 * len(data))]
    assert validation[0].read() == data[int(0.9 * len(data)) :]
    assert test == ()


@settings(deadline=None)
@given(
    texts=st.lists(st.text(min_size=1, max_size=12), min_size=1, max_size=5),
    shares=st.tuples(st.floats(0, 0.45), st.floats(0, 0.45)),
)
def test_parts_by_position_are_the_text_in_order(tmp_path_factory, texts, shares):
    folder = tmp_path_factory.mktemp("texts")
    texts = [t.encode("utf-8", "replace").decode() for t in texts]
    documents = []
    for i, text in enumerate(texts):
        path = folder / f"{i}.txt"
        path.write_bytes(text.encode())
        documents.append(Document(path.name, path, 0, os.path.getsize(path)))
    parts = split_by_position(documents, *shares)
    # every piece is UTF-8 by itself, and together they are all of it
    assert "".join(d.read_text() for part in parts for d in part) == "".join(texts)


@pytest.mark.parametrize(
    ("place", "sentence"),
    [
        ("", "a path must be some text without NUL, got ''"),
        ("a\0b", r"a path must be some text without NUL, got 'a\\x00b'"),
        ("~nobody-here/x", "must begin with a home folder"),
    ],
)
def test_paths_that_lead_nowhere_are_refused(place, sentence):
    with pytest.raises(ValueError, match=sentence):
        find_documents([place])


@pytest.mark.parametrize("pattern", ["../*", "a/../../*", "/etc/*", "..", "", "."])
def test_patterns_that_leave_the_folder_are_refused(tmp_path, pattern):
    (tmp_path / "inside").mkdir()
    write(tmp_path, secret_txt=b"not asked for")
    write(tmp_path / "inside", a_txt=b"text")
    with pytest.raises(ValueError, match="a pattern must name files below the folder, got"):
        find_documents([str(tmp_path / "inside")], ["*.txt", pattern])


def test_no_patterns_are_refused(tmp_path):
    with pytest.raises(ValueError, match="patterns must name at least one, got none"):
        find_documents([str(tmp_path)], [])


def test_a_pattern_that_pathlib_does_not_know_is_refused(tmp_path):
    write(tmp_path, a_txt=b"text")
    with pytest.raises(
        ValueError, match=r"\*\* must be a whole part of a pattern, got '\*\*a'"
    ):
        find_documents([str(tmp_path)], ["**a"])


def test_patterns_may_have_parts(tmp_path):
    (tmp_path / "x" / "y").mkdir(parents=True)
    write(tmp_path / "x" / "y", a_txt=b"text")
    for pattern in ("y/*", "**/y/*.txt", "x/**/a.txt", "./y/a.*"):
        assert [d.name for d in find_documents([str(tmp_path)], [pattern])] == ["x/y/a.txt"]


def test_what_can_be_read_only_once_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe must be a regular file or a folder"):
        find_documents([str(tmp_path / "pipe")])
