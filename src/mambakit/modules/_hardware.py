"""Which short number formats the hardware multiplies itself."""

from functools import cache

import torch


@cache
def _cpu_capabilities() -> dict[str, bool]:
    if hasattr(torch.cpu, "get_capabilities"):  # public from PyTorch 2.11 on
        return {name: value is True for name, value in torch.cpu.get_capabilities().items()}
    return {
        "avx512_bf16": torch.cpu._is_avx512_bf16_supported(),
        "amx_bf16": torch.cpu._is_amx_tile_supported(),
        "amx_fp16": torch.cpu._is_amx_fp16_supported(),
    }


_INSTRUCTIONS = {
    torch.bfloat16: ("avx512_bf16", "amx_bf16", "bf16"),
    torch.float16: ("avx512_fp16", "amx_fp16", "fp16_arith"),
}


def cpu_instructions(dtype: torch.dtype) -> list[str]:
    """Name the processor's instruction sets that multiply bfloat16 or float16."""
    able = _cpu_capabilities()
    return [name for name in _INSTRUCTIONS[dtype] if able.get(name, False)]


def in_hardware(dtype: torch.dtype, device: torch.device) -> bool:
    """Say whether the device multiplies bfloat16 or float16 itself, or emulates it."""
    if device.type == "cuda":
        return dtype != torch.bfloat16 or torch.cuda.is_bf16_supported(
            including_emulation=False
        )
    if device.type == "cpu":
        return bool(cpu_instructions(dtype))
    return False
