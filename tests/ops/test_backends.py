"""Which implementation a backend's name stands for, and why a named one may refuse."""

import re
import shutil

import pytest
import torch

from mambakit.ops import _backends, _native, selective_scan
from mambakit.ops._backends import resolve

CPU, META = torch.device("cpu"), torch.device("meta")
REASON = "the CPU library was not built: no C++ compiler was found"


@pytest.fixture
def no_library(monkeypatch):
    monkeypatch.setitem(_backends.MISSING, "cpu", REASON)


@pytest.fixture
def library(monkeypatch):
    monkeypatch.setitem(_backends.MISSING, "cpu", None)


def test_auto_is_fused_where_the_device_has_it(library):
    assert resolve("scan", "auto", CPU) == "fused"
    assert resolve("scan", "auto", META) == "parallel"


def test_auto_is_parallel_without_the_library(no_library):
    assert resolve("scan", "auto", CPU) == "parallel"


@pytest.mark.parametrize("name", ["reference", "parallel"])
def test_a_plain_backend_runs_anywhere(no_library, name):
    assert resolve("scan", name, CPU) == name
    assert resolve("scan", name, META) == name


def test_fused_runs_or_says_why_not(no_library):
    with pytest.raises(RuntimeError, match=f"cannot run here: {re.escape(REASON)}$"):
        resolve("scan", "fused", CPU)
    with pytest.raises(RuntimeError, match=r"there is no fused kernel for meta tensors$"):
        resolve("scan", "fused", META)


@pytest.mark.refuses
def test_an_unknown_backend_is_refused(library):
    with pytest.raises(
        ValueError, match=r"^scan: backend must be one of \('auto', .*'triton'$"
    ):
        resolve("scan", "triton", CPU)


def test_the_scan_runs_without_the_library_and_refuses_fused(no_library):
    x, A, B = torch.ones(1, 3, 2), -torch.ones(2, 4), torch.ones(1, 3, 4)
    auto = selective_scan(x, x, A, B, B)
    assert torch.equal(auto.y, selective_scan(x, x, A, B, B, backend="parallel").y)
    with pytest.raises(RuntimeError, match="selective_scan: backend 'fused' cannot run here"):
        selective_scan(x, x, A, B, B, backend="fused")


@pytest.mark.skipif(
    not any(shutil.which(name) for name in ("c++", "g++", "clang++")), reason="no C++ compiler"
)
def test_the_library_is_there_if_a_compiler_is():
    assert _native.unavailable() is None
