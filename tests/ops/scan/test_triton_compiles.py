"""The scan in Triton compiled for devices that are not here: the interpreter knows no types.

As a script, ``python test_triton_compiles.py cuda:75:32``, this compiles for one of them, named
by a backend, an architecture and the width of a warp.
"""

import os
import subprocess
import sys

import pytest
import torch

triton = pytest.importorskip("triton", reason="needs Triton, which PyTorch brings for GPUs")

KERNELS = ("_forward", "_backward")


@pytest.mark.parametrize("target", ["cuda:75:32", "hip:gfx942:64"])
def test_compiles_for_a_device_that_is_not_here(target, tmp_path):
    # in a process of its own, for what Triton does is settled when it is imported
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, __file__, target],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [*KERNELS] * 3


class Compiler:
    """Stands in the place of a kernel, and compiles it where it would have been launched."""

    types = {  # noqa: RUF012
        torch.float64: "*fp64",
        torch.float32: "*fp32",
        torch.bfloat16: "*bf16",
        torch.int64: "*i64",
    }

    def __init__(self, kernel, target):
        self.kernel, self.target = kernel, target

    def __getitem__(self, grid):
        return self.compile

    def compile(self, *, num_warps, **arguments):
        signature, constants, aligned = {}, {}, {}
        for i, parameter in enumerate(self.kernel.params):
            value = arguments[parameter.name]
            if parameter.is_constexpr or value is None:
                signature[parameter.name], constants[i,] = "constexpr", value
            elif torch.is_tensor(value):
                signature[parameter.name] = self.types[value.dtype]
                aligned[i,] = [["tt.divisibility", 16]]
            else:
                signature[parameter.name] = parameter.annotation_type
        triton.compile(
            triton.compiler.ASTSource(self.kernel, signature, constants, aligned),
            target=self.target,
            options={"num_warps": num_warps},
        )
        print(self.kernel.__name__)


def compile_scan(scan, n, dtype, form, extras, packed=False):
    b, l, d = 1 if packed else 2, 64, 128
    cu_seqlens = torch.tensor([0, l]) if packed else None
    x, A = torch.zeros(b, l, d, dtype=dtype), torch.zeros(d, n)
    B = torch.zeros({"token": (b, l, n), "constant": (d, n)}[form], dtype=dtype)
    D, gate, bias, state = (A[:, 0], x, A[:, 0], torch.zeros(b, d, n)) if extras else [None] * 4
    operands = (x, x, A, B, B, D, gate, bias, state)
    _, last, checkpoints = scan.forward(*operands, extras, True, cu_seqlens=cu_seqlens)
    last = last if extras else None
    scan.backward(x, last, *operands, checkpoints, extras, cu_seqlens=cu_seqlens)


def main(backend, architecture, width):
    from triton.backends.compiler import GPUTarget

    from mambakit.ops.scan import triton as scan

    name = int(architecture) if architecture.isdigit() else architecture
    for kernel in KERNELS:
        target = GPUTarget(backend, name, int(width))
        setattr(scan, kernel, Compiler(getattr(scan, kernel), target))
    compile_scan(scan, 16, torch.bfloat16, "token", extras=True)
    compile_scan(scan, 5, torch.float64, "constant", extras=False)
    compile_scan(scan, 16, torch.bfloat16, "token", extras=True, packed=True)


if __name__ == "__main__":
    main(*sys.argv[1].split(":"))
