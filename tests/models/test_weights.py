"""Laws of weight files: tensors come out as they went in, and nothing else comes out."""

import json
import os
import pickle
import re

import pytest
import torch
from safetensors.torch import save_file
from torch.testing import assert_close

from mambakit.models.weights import find_weights, read_index, read_tensors, write_tensors

TENSORS = {
    "a": torch.randn(3, 4),
    "b": torch.randn(5).bfloat16(),
    "c": torch.tensor([float("nan"), float("-inf"), -0.0]),
}


def same(left, right):
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype
        assert_close(tensor, right[name], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_tensors_come_back(tmp_path, name):
    path = tmp_path / name
    write_tensors(TENSORS, path, pickled=name.endswith(".bin"))
    assert find_weights(tmp_path) == path
    same(read_tensors(path), TENSORS)


def test_files_from_before_the_zip_format_are_read(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    torch.save(TENSORS, path, _use_new_zipfile_serialization=False)
    same(read_tensors(path), TENSORS)


@pytest.mark.parametrize(
    ("odd", "kind"),
    [
        (TENSORS["a"].to_sparse, "one of layout sparse_coo"),
        (lambda: TENSORS["a"].to("meta"), "one on meta, without values"),
        (lambda: torch.nested.nested_tensor([TENSORS["b"]] * 2), "a nested one"),
    ],
    ids=["sparse", "meta", "nested"],
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_pickled_tensors_of_another_kind_are_named(tmp_path, odd, kind):
    path = tmp_path / "pytorch_model.bin"
    torch.save(TENSORS | {"odd": odd()}, path)
    words = rf"dense tensors with their values, got {kind}: odd$"
    with pytest.raises(ValueError, match=rf"^load: .*bin must hold {words}"):
        read_tensors(path)


def write_shards(folder, kind, tensors=TENSORS):
    weight_map = {}
    for i, (name, tensor) in enumerate(tensors.items()):
        file = f"shard-{i}.{kind}"
        write_tensors({name: tensor}, folder / file, pickled=kind == "bin")
        weight_map[name] = file
    stem = "pytorch_model.bin" if kind == "bin" else "model.safetensors"
    path = folder / f"{stem}.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_shards_are_read_as_one(tmp_path, kind):
    path = write_shards(tmp_path, kind)
    assert find_weights(tmp_path) == path
    same(read_tensors(path), TENSORS)


def test_a_missing_shard_is_named(tmp_path):
    path = write_shards(tmp_path, "safetensors")
    (tmp_path / "shard-1.safetensors").unlink()
    with pytest.raises(ValueError, match=r"there is no file .*shard-1\.safetensors$"):
        read_tensors(path)


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ({}, "must map names of tensors to files in weight_map"),
        ({"weight_map": {"a": 3}}, "must map names of tensors to files"),
        ({"weight_map": {"a": "../x.bin"}}, r"must name files beside it, got '../x\.bin'"),
        ({"weight_map": {"a": "/etc/passwd"}}, "must name files beside it"),
        ({"weight_map": {"a": ".."}}, "must name files beside it"),
        ([], "must be a JSON object, got list"),
    ],
)
def test_an_index_that_is_none_is_refused(tmp_path, index, words):
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=words):
        read_index(path)


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no file .*model\.safetensors, and neither .*\.bin"):
        find_weights(tmp_path)


def test_safetensors_are_preferred(tmp_path):
    for name in ("pytorch_model.bin", "model.safetensors"):
        (tmp_path / name).touch()
    assert find_weights(tmp_path).name == "model.safetensors"


class Attack:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("by_torch", [True, False])
def test_a_pickle_that_would_run_code_is_refused_and_does_not(tmp_path, by_torch):
    path = tmp_path / "pytorch_model.bin"
    attack = {"a": Attack(tmp_path / "ran")}
    if by_torch:
        torch.save(attack, path)
    else:
        path.write_bytes(pickle.dumps(attack, protocol=2))
    with pytest.raises(ValueError, match=r"asks for \w+\.mkdir; it was not executed$"):
        read_tensors(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "content",
    [[torch.ones(2)], {"a": 3}, {3: torch.ones(2)}, {"model": TENSORS}, torch.ones(1)],
)
def test_a_pickle_of_anything_else_is_refused(tmp_path, content):
    path = tmp_path / "pytorch_model.bin"
    torch.save(content, path)
    with pytest.raises(ValueError, match="must hold a dictionary of names to tensors"):
        read_tensors(path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("zipped", [True, False])
def test_damaged_pickles_are_one_sentence(tmp_path, zipped):
    path = tmp_path / "pytorch_model.bin"
    torch.save(TENSORS, path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    draw = torch.Generator().manual_seed(0)
    refusals = []
    for i in range(150):
        data = bytearray(whole)
        at = int(torch.randint(min(len(data), 900), (), generator=draw))
        if i % 3 == 0:
            del data[at:]
        else:
            data[at : at + i % 40] = bytes(
                torch.randint(256, (i % 40,), generator=draw).tolist()
            )
        path.write_bytes(data)
        try:
            read_tensors(path)
        except ValueError as error:
            refusals.append(str(error))
    assert len(refusals) > 50
    assert all(re.fullmatch(rf"load: {path} must .*", refusal) for refusal in refusals)


@pytest.mark.parametrize(
    "content", [b"", b"hello world", b"PK\x03\x04 no archive", b"\x80\x02."]
)
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_files_of_another_kind_are_refused(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"must be a whole .* truncated"):
        read_tensors(path)


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    save_file({"a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "x")
    save_file({"a": torch.zeros(1)}, tmp_path / "y")
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"a": "x", "b": "x", "c": "y"}}))
    with pytest.raises(ValueError, match=r"each tensor once, but y repeats a$"):
        read_tensors(path)
