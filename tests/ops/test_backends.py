"""Which implementation a backend's name stands for, and why a named one may refuse."""

import re
import shutil

import pytest
import torch

from mambakit.ops import _backends, _native, selective_scan
from mambakit.ops._backends import resolve
from mambakit.ops.scan import fused

pytestmark = pytest.mark.cpu

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


@pytest.fixture
def gpu(monkeypatch):
    """Pretend to a GPU that the CUDA kernels do not serve; Triton does, unless told."""
    said = {"cuda": "there is no compiler", "triton": None}
    monkeypatch.setattr(_backends._cuda, "unavailable", lambda index: said["cuda"])
    monkeypatch.setattr(_backends, "_ask_about_triton", lambda kind, index: said["triton"])
    return said


@pytest.mark.parametrize("operation", ["selective_scan", "selective_step"])
def test_triton_has_the_scan_where_the_cuda_kernels_cannot_run(gpu, monkeypatch, operation):
    device = torch.device("cuda", 0)
    assert _backends.fused_kernels(operation, device) == ("triton", "there is no compiler")
    assert resolve(operation, "auto", device) == resolve(operation, "fused", device) == "fused"
    gpu["cuda"] = None
    assert _backends.fused_kernels(operation, device) == ("cuda", None)
    assert _backends.fused_kernels(operation, torch.device("xpu", 0)) == ("triton", None)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert _backends.fused_kernels(operation, device) == ("triton", None)


@pytest.mark.parametrize("operation", ["causal_conv1d", "causal_conv1d_step", "Mamba"])
def test_what_has_no_form_in_triton_is_plain_pytorch_there(gpu, operation):
    for kind, reason in (("cuda", gpu["cuda"]), ("xpu", "no fused kernel for xpu tensors")):
        device = torch.device(kind, 0)
        assert resolve(operation, "auto", device) == "parallel"
        with pytest.raises(
            RuntimeError, match=f"^{operation}: .* cannot run here: .*{reason}$"
        ):
            resolve(operation, "fused", device)
    gpu["cuda"] = None
    assert resolve(operation, "fused", torch.device("cuda", 0)) == "fused"


def test_without_triton_either_both_reasons_are_told(gpu):
    gpu["triton"] = "nor Triton"
    with pytest.raises(
        RuntimeError, match=r"cannot run here: there is no compiler; nor Triton$"
    ):
        resolve("selective_scan", "fused", torch.device("cuda", 0))
    assert resolve("selective_scan", "auto", torch.device("cuda", 0)) == "parallel"


def test_triton_is_asked_what_it_lacks(monkeypatch):
    ask = _backends._ask_about_triton.__wrapped__
    monkeypatch.setattr(_backends, "find_spec", lambda name: None)
    assert ask("cuda", 0) == "Triton, in which there is a slower one, is not installed"
    monkeypatch.setattr(_backends, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert ask("cuda", 0) == "Triton has no GPU either"
    assert ask("xpu", 0) is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, answer in (((7, 0), "Triton's need 7.5"), ((7, 5), None)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index, c=capability: c)
        assert ask("cuda", 0) == answer


@pytest.mark.refuses  # what stands in for a tensor is none
def test_tensors_on_a_gpu_go_to_the_kernels_that_run_there(gpu, monkeypatch):
    """The choice alone: each kernel is tested where it can run."""
    calls = []

    class Kernels:
        def __init__(self, name):
            self.name = name

        def forward(self, *given, cu_seqlens):
            calls.append((self.name, *given[1:], cu_seqlens))

        def backward(self, *given, cu_seqlens, **room):
            calls.append((self.name, *given[1:], cu_seqlens, *room))

    class OnGPU:
        device = torch.device("cuda", 0)

    monkeypatch.setattr(fused, "_triton", lambda: Kernels("triton"))
    monkeypatch.setattr(fused, "cuda_forward", Kernels("cuda"))
    monkeypatch.setattr(fused, "cuda_backward", Kernels("cuda"))
    for why_not in ("it is old", None):
        gpu["cuda"] = why_not
        fused._forward_on_gpu(OnGPU(), 1, cu_seqlens="pack")
        fused._backward_on_gpu(OnGPU(), 2, cu_seqlens="pack")
    assert calls == [
        ("triton", 1, "pack"), ("triton", 2, "pack"),
        ("cuda", 1, "pack"), ("cuda", 2, "pack", "dgate"),
    ]  # fmt: skip


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


@pytest.mark.compiles
def test_compilers_take_what_is_said_of_a_gpu_as_it_is(monkeypatch):
    monkeypatch.setattr(_backends._cuda, "unavailable", lambda index: f"GPU {index} is old")
    monkeypatch.setattr(_backends, "_ask_about_triton", lambda kind, index: f"{kind} {index}")

    @torch.compile(fullgraph=True, backend="eager")
    def chosen(x):
        name = resolve("selective_scan", "auto", torch.device("cuda", 1))
        return x + 1 if name == "parallel" else x

    assert chosen(torch.ones(2)).tolist() == [2, 2]
    with pytest.raises(RuntimeError, match=r"cannot run here: GPU 1 is old; cuda 1$"):
        resolve("selective_scan", "fused", torch.device("cuda", 1))
