"""Where a run computes and in which number format, decided once and said aloud."""

from typing import NamedTuple

import torch

from mambakit.modules._hardware import in_hardware


class Machine(NamedTuple):
    """What a run computes on.

    Attributes:
        device: The device of weights and batches.
        autocast: The dtype that matrix products are cast to, or ``None`` for float32.
        why: A clause for the reader, saying why this precision.
    """

    device: torch.device
    autocast: torch.dtype | None
    why: str


def resolve_device(device: str, setting: str = "training.device") -> torch.device:
    """Turn ``"auto"`` into CUDA where there is one and CPU elsewhere.

    Args:
        device: ``"auto"`` or the name of a device.
        setting: What errors call it.

    Raises:
        ValueError: ``device`` is not the name of a device.
        RuntimeError: The device is not there; the sentence names those that are.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise ValueError(
            f"{setting} must be auto or a PyTorch device such as cpu or cuda:0, got {device!r}"
        ) from error
    if resolved.type == "meta":
        raise ValueError(f"{setting} must be one that computes, got 'meta'")
    try:
        torch.empty(1, device=resolved)
    except (RuntimeError, AssertionError, ImportError) as error:
        raise RuntimeError(
            f"{setting} must be auto or a device that is here ({', '.join(_devices())}), "
            f"got {device!r}: {_why_absent(resolved, error)}"
        ) from error
    return resolved


def _devices() -> list[str]:
    """Name the devices that can be used."""
    kind = torch.accelerator.current_accelerator(check_available=True)
    if kind is None:
        return ["cpu"]
    return ["cpu", *(f"{kind.type}:{i}" for i in range(torch.accelerator.device_count()))]


def _why_absent(device: torch.device, error: Exception) -> str:
    kind = torch.accelerator.current_accelerator()  # what PyTorch is built for, there or not
    if kind is None or kind.type != device.type:
        return "this PyTorch is built without it"  # its own words are of dispatch keys
    return str(error).splitlines()[0].partition(". ")[0]


def resolve_machine(device: str, precision: str) -> Machine:
    """Settle the device and the precision of a run.

    ``"auto"`` precision is bf16 only where the hardware has it: emulated, it is slower than
    fp32 and no better.
    """
    resolved = resolve_device(device)
    able = in_hardware(torch.bfloat16, resolved)
    name = resolved.type.upper()
    if precision == "auto":
        why = f"the {name} {'has' if able else 'does not have'} bf16 in hardware"
        return Machine(resolved, torch.bfloat16 if able else None, why)
    if precision == "bf16":
        why = "as asked" if able else f"as asked, though the {name} has to emulate it"
        return Machine(resolved, torch.bfloat16, why)
    return Machine(resolved, None, "as asked")
