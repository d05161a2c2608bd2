"""Find out what runs on this machine and whether it computes the right numbers."""

import platform
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from mambakit.modules._hardware import cpu_instructions
from mambakit.ops import _cuda, causal_conv1d, selective_scan
from mambakit.ops._backends import (
    Backend,
    Implementation,
    Kernels,
    fused_kernels,
    why_not_fused,
)
from mambakit.ops._native import isa, not_built

# Instructions that decide which kernel is picked and how fast bf16 can be.
CPU_FEATURES = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16")

# Largest error of a float32 result, relative to the largest value of the float64 one. Rounding
# alone leaves about a tenth of it; a wrong formula or a wrong index leaves far more.
TOLERANCE = 1e-5


class Check(NamedTuple):
    """One numerical check: what ran, its relative error, and whether that is small enough."""

    name: str
    error: float

    @property
    def passed(self) -> bool:
        """Whether the error is within the tolerance; a NaN is not."""
        return self.error <= TOLERANCE


def report(write: Callable[[str], object] = print) -> bool:
    """Write what runs here, line by line, and return whether every check passed.

    A kernel that is missing is named with the reason and is no failure: the ``parallel``
    backend takes its place.

    Example:
        >>> lines = []
        >>> report(lines.append)
        True
        >>> lines[-1]
        'everything works'
    """
    for title, rows in (
        ("versions", versions()),
        ("processor", processor()),
        ("devices", devices()),
        ("kernels", kernels()),
    ):
        write(title)
        for name, value in rows:
            write(f"  {name:<15} {value}")
    write(f"checks against the recurrence in float64 (error must be at most {TOLERANCE:g})")
    failed = 0
    for check in checks():
        failed += not check.passed
        verdict = "ok" if check.passed else "WRONG"
        write(f"  {check.name:<44} {check.error:8.1e}  {verdict}")
    write("everything works" if not failed else f"{failed} of the checks failed")
    return not failed


def versions() -> Iterator[tuple[str, str]]:
    """List Python, this package and the packages it can use, each with its version.

    Triton, which GPU builds of PyTorch bring and no extra, is told where it is there. NVRTC is
    told by the library that was found, whichever package it is from.
    """
    yield "python", platform.python_version()
    yield "mambakit", metadata.version("mambakit")
    for name, extra in (
        ("torch", None),
        ("numpy", None),
        ("safetensors", None),
        ("matplotlib", "plot"),
        ("tokenizers", "tokenizers"),
        ("huggingface_hub", "hub"),
        ("triton", None),
        ("cuda-bindings", "cuda"),
    ):
        try:
            yield name, metadata.version(name)
        except metadata.PackageNotFoundError:
            if extra is not None:
                yield name, f"not installed (pip install 'mambakit[{extra}]')"
    try:
        nvrtc = ".".join(map(str, _cuda.version()))
    except RuntimeError as why:
        nvrtc = f"not usable: {why}"
    yield "nvrtc", nvrtc


def processor() -> Iterator[tuple[str, str]]:
    """List the processor's name, the features that matter here, and torch's threads.

    Beside them, with what it multiplies bfloat16, which decides how products of models in it
    are computed (``mambakit.modules.linear``).
    """
    name, features = platform.processor() or platform.machine(), ""
    table = Path("/proc/cpuinfo")
    if table.exists():
        lines = (line.partition(":") for line in table.read_text().splitlines())
        entries = {key.strip().lower(): value.strip() for key, _, value in lines}
        name = entries.get("model name", name)
        present = set(entries.get("flags", entries.get("features", "")).split())
        features = " ".join(feature for feature in CPU_FEATURES if feature in present)
    yield "name", name
    yield "features", features or torch.backends.cpu.get_cpu_capability().lower()
    short = " and ".join(cpu_instructions(torch.bfloat16))
    yield "bf16", short or "no instructions: products of 16 rows or more are made in float32"
    yield "threads", str(torch.get_num_threads())


def devices() -> Iterator[tuple[str, str]]:
    """List every device that torch can compute on here."""
    for device in _present():
        if device.type == "cuda":
            name = torch.cuda.get_device_name(device)
            major, minor = torch.cuda.get_device_capability(device)
            yield str(device), f"{name}, compute capability {major}.{minor}"
        else:
            yield str(device), "available"


def kernels() -> Iterator[tuple[str, str]]:
    """Say for each device which backend ``"auto"`` takes, and why not a faster one.

    A build of the CPU library that failed is told even where another serves.
    """
    for device in _present():
        scan, conv = (
            fused_kernels(name, device) for name in ("selective_scan", "causal_conv1d")
        )
        if scan == conv:
            yield str(device), _described(scan)
        else:
            yield str(device), f"selective_scan {_described(scan)}"
            yield "", f"causal_conv1d {_described(conv)}"
    note = not_built()
    if note is not None and note not in (
        why_not_fused("selective_scan", torch.device("cpu")) or ""
    ):
        yield "not built", note


def _described(kernels: Kernels) -> str:
    kind, why_not = kernels
    if kind is None:
        return f"parallel; fused is not usable: {why_not}"
    if kind == "cpu":
        return f"fused ({isa()})"
    if kind == "cuda":
        return f"fused (compiled by NVRTC {'.'.join(map(str, _cuda.version()))})"
    slower = "" if why_not is None else f", slower than the CUDA kernels: {why_not}"
    return f"fused (Triton{slower})"


def checks() -> Iterator[Check]:
    """Compare values and gradients of each usable backend with the float64 reference."""
    for device in _present():
        for name, run in (("selective_scan", _scan), ("causal_conv1d", _conv)):
            backends: list[Implementation] = ["parallel"]
            if why_not_fused(name, device) is None:
                backends.append("fused")
            for backend in backends:
                values, gradients = _errors(run, backend, device)
                yield Check(f"{name} {backend} on {device}", values)
                yield Check(f"{name} {backend} on {device}, gradients", gradients)


def _present() -> Iterator[torch.device]:
    """List the devices of this machine: the processor first, then every accelerator."""
    yield torch.device("cpu")
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None:
        for index in range(torch.accelerator.device_count()):
            yield torch.device(accelerator.type, index)


# Lengths and sizes that fill no tile, no vector and no group of four states evenly.
_B, _L, _D, _N, _W = 2, 131, 19, 5, 4

_Inputs = dict[str, Tensor]
_Run = Callable[[_Inputs, Backend], tuple[Tensor, ...]]


def _scan(t: _Inputs, backend: Backend) -> tuple[Tensor, ...]:
    return selective_scan(
        t["x"], t["dt"], t["A"], t["B"], t["C"], t["D"], gate=t["gate"],
        dt_bias=t["dt_bias"], dt_softplus=True, state=t["state"], backend=backend,
    )  # fmt: skip


def _conv(t: _Inputs, backend: Backend) -> tuple[Tensor, ...]:
    return causal_conv1d(
        t["x"], t["weight"], t["bias"], activation="silu", state=t["past"], backend=backend
    )


def _inputs() -> _Inputs:
    """Draw one set of inputs for both operations, the same on every machine."""
    draw = torch.Generator().manual_seed(0)
    shapes = {
        "x": (_B, _L, _D), "dt": (_B, _L, _D), "gate": (_B, _L, _D), "A": (_D, _N),
        "B": (_B, _L, _N), "C": (_B, _L, _N), "D": (_D,), "dt_bias": (_D,),
        "state": (_B, _D, _N), "weight": (_D, _W), "bias": (_D,), "past": (_B, _D, _W - 1),
    }  # fmt: skip
    drawn = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    return drawn | {"A": -torch.exp(drawn["A"])}


def _errors(run: _Run, backend: Backend, device: torch.device) -> tuple[float, float]:
    """Return the largest relative error of the values and of the gradients."""
    truth = _evaluate(run, "reference", torch.device("cpu"), torch.float64)
    found = _evaluate(run, backend, device, torch.float32)
    values, gradients = (
        # torch's maximum, unlike Python's, lets no NaN slip by
        torch.stack([_relative(f, t) for f, t in zip(fs, ts, strict=True)]).max().item()
        for fs, ts in zip(found, truth, strict=True)
    )
    return values, gradients


def _evaluate(
    run: _Run, backend: Backend, device: torch.device, dtype: torch.dtype
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    inputs = {
        name: tensor.to(device, dtype).requires_grad_() for name, tensor in _inputs().items()
    }
    outputs = run(inputs, backend)
    # Uneven gradients of the outputs, so that no mistake is lost in a symmetry.
    arriving = [
        torch.arange(output.numel(), device=device, dtype=dtype).cos().view_as(output)
        for output in outputs
    ]
    gradients = torch.autograd.grad(outputs, list(inputs.values()), arriving, allow_unused=True)
    return outputs, tuple(gradient for gradient in gradients if gradient is not None)


def _relative(found: Tensor, truth: Tensor) -> Tensor:
    error = (found.detach().cpu().double() - truth.detach()).abs().max()
    return error / truth.detach().abs().max()
