"""Laws of the machine: what is asked for is what runs, and the reason is said."""

import re

import pytest
import torch

from mambakit.modules._hardware import in_hardware
from mambakit.training.precision import resolve_device, resolve_machine


def test_what_is_named_is_what_runs():
    assert resolve_machine("cpu", "fp32").autocast is None
    assert resolve_machine("cpu", "bf16").autocast == torch.bfloat16


def test_auto_is_bf16_only_where_the_hardware_has_it():
    machine = resolve_machine("cpu", "auto")
    able = in_hardware(torch.bfloat16, torch.device("cpu"))
    assert (machine.autocast is not None) == able
    assert ("does not have" in machine.why) == (not able)


@pytest.mark.parametrize("name", ["gpu", "", "cuda:-1", "cuda:x"])
def test_a_device_that_is_none_is_refused(name):
    words = f"must be auto or a PyTorch device such as cpu or cuda:0, got '{name}'"
    with pytest.raises(ValueError, match=f"^training.device {words}$"):
        resolve_device(name)


ACCELERATOR = torch.accelerator.current_accelerator()
KIND = None if ACCELERATOR is None else ACCELERATOR.type
ABSENT = ("cuda", "mps", "xpu", "mtia", "hpu", "vulkan", "opengl", "privateuseone")


@pytest.mark.parametrize("kind", [kind for kind in ABSENT if kind != KIND])
def test_a_device_that_pytorch_is_not_built_for_is_one_sentence(kind):
    with pytest.raises(RuntimeError) as refusal:
        resolve_device(f"{kind}:0")
    assert re.fullmatch(
        r"training.device must be auto or a device that is here \(cpu(, \w+:\d+)*\), "
        rf"got '{kind}:0': this PyTorch is built without it",
        str(refusal.value),
    )


def test_a_device_that_is_not_there_is_one_sentence_with_those_that_are(monkeypatch):
    def refuse(*sizes, device):
        raise RuntimeError("CUDA error: invalid device ordinal\nGPU device may be out of range")

    def current(check_available=False):
        return torch.device("cuda")

    monkeypatch.setattr(torch, "empty", refuse)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", current)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    with pytest.raises(RuntimeError) as refusal:
        resolve_device("cuda:9", "generate: --device")
    assert str(refusal.value) == (
        "generate: --device must be auto or a device that is here (cpu, cuda:0, cuda:1), "
        "got 'cuda:9': CUDA error: invalid device ordinal"
    )


def test_a_device_that_computes_nothing_is_refused():
    with pytest.raises(ValueError, match="must be one that computes, got 'meta'"):
        resolve_device("meta")
