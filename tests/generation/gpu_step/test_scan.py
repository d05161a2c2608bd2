"""The scan of many sequences computes what that of a few does."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from mambakit.generation.gpu_step import launches, packing
from mambakit.generation.gpu_step.arguments import Call, ScanArguments, ScanManyArguments
from mambakit.generation.gpu_step.launches import Sizes
from mambakit.generation.gpu_step.tiling import GPU, group, tile_scan
from mambakit.ops import _cuda

CHANNELS, SPANS = 144, 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("n", "r", "eps", "b"),
    # of odd ranks, two lengths of pieces, norms, one sequence at a time, weights read again
    [
        (16, 35, 0.0, 11),
        (16, 16, 1e-5, 11),
        (16, 36, 1e-5, 35),
        (32, 3, 0.0, 11),
        (16, 256, 0.0, 35),
    ],
)
def test_many_sequences_go_on_as_few_do(dtype, n, r, eps, b):
    d = CHANNELS
    sums = torch.randn(SPANS, b, r + 2 * n)
    matrix = packing.pack(torch.randn(d, r) / r**0.5, dtype).weights
    A, D = -torch.rand(d, n) - 0.1, torch.randn(d)
    bias, gate_bias = torch.randn(d), torch.randn(d)
    u, gate = torch.randn(b, d).to(dtype), torch.randn(b, d).to(dtype)
    old = torch.randn(b, d, n)
    sizes = Sizes(dtype, dtype, dtype, 8, n, r, 4)

    def run(defines, source, grid, make, shared=0, **more: Any):
        new, y = torch.full_like(old, torch.nan), torch.full_like(u, torch.nan)
        call = Call(b, None, old.data_ptr(), None, new.data_ptr(), None)
        held = torch.tensor(list(bytes(call)), dtype=torch.uint8)
        arguments = make(
            call=held.data_ptr(),
            sums=sums.data_ptr(),
            capacity=b,
            selection_eps=eps,
            matrix=matrix.data_ptr(),
            bias=bias.data_ptr(),
            A=A.data_ptr(),
            D=D.data_ptr(),
            u=u.data_ptr(),
            y=y.data_ptr(),
            channels=d,
            stride=d,
            **more,
        )
        kernel = _cuda.kernel(source, "scan", defines, sums.get_device(), shared)
        kernel.launch(grid, 256, arguments, shared)
        return new, y.float()

    rows, opened = group(b, n), F.silu(gate.float() + gate_bias)
    few = run(
        sizes.scan(rows, SPANS),
        launches.SCAN,
        (-(-d // 64), -(-b // rows), 1),
        ScanArguments,
        gate=opened.data_ptr(),
    )
    cut = tile_scan(b, d, n, r, GPU(2, 99 * 1024))
    many = run(
        sizes.scan_many(cut, SPANS),
        launches.SCAN_MANY,
        cut.grid(d, b),
        ScanManyArguments,
        cut.shared_bytes,
        gate=gate.data_ptr(),
        gate_stride=d,
        gate_bias=gate_bias.data_ptr(),
    )
    # dt_proj's vectors come as two short numbers each: the first alone would be off by 1e-3
    assert_close(many[0], few[0], rtol=5e-5, atol=5e-5)
    assert_close(many[1], few[1], rtol=2 * torch.finfo(dtype).eps, atol=1e-3)
