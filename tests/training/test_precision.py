"""Laws of the machine: what is asked for is what runs, and the reason is said."""

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


def test_a_device_that_is_none_is_refused():
    with pytest.raises(ValueError, match="must be auto or a PyTorch device, got 'gpu'"):
        resolve_device("gpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(RuntimeError, match="'cuda' cannot be used"):
        resolve_device("cuda")


def test_a_device_that_computes_nothing_is_refused():
    with pytest.raises(ValueError, match="must be one that computes, got 'meta'"):
        resolve_device("meta")
