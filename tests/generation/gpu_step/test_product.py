"""Products, however they are cut, against float64."""

import pytest
import torch

from mambakit.generation.cpu_step.library import step_library
from mambakit.generation.gpu_step import launches, packing
from mambakit.generation.gpu_step.arguments import Call, ProductArguments
from mambakit.generation.gpu_step.launches import Sizes
from mambakit.generation.gpu_step.multiplication import Multiplication
from mambakit.generation.gpu_step.tiling import (
    GPU,
    Tiling,
    _slices,
    _step,
    group,
    library_spans,
    room,
    takes_library,
    tile,
    tile_scan,
)
from mambakit.ops import _cuda, _native

ROWS = 75

# (dtype of the matrix, of the vectors), rows and columns of a block, columns of the matrix.
BF16, FP16, INT8, FP32 = torch.bfloat16, torch.float16, torch.int8, torch.float32
CASES = [
    (BF16, BF16, 16, 8, 528), (BF16, BF16, 16, 128, 300), (BF16, BF16, 32, 32, 144),
    (BF16, BF16, 32, 128, 300), (BF16, BF16, 64, 8, 200), (BF16, BF16, 64, 64, 200),
    (BF16, BF16, 64, 128, 144), (FP16, FP16, 32, 16, 300),
    (INT8, BF16, 16, 16, 1100), (INT8, BF16, 32, 128, 300), (INT8, BF16, 64, 8, 400),
    (INT8, FP16, 64, 32, 200),
    (FP32, FP32, 16, 16, 300), (FP32, FP32, 32, 8, 77), (FP32, FP32, 64, 16, 100),
]  # fmt: skip


@pytest.mark.parametrize("spans", [1, 2])
@pytest.mark.parametrize(("storage", "factor", "rows", "columns", "k"), CASES)
def test_any_tiling_gives_the_product(storage, factor, rows, columns, k, spans):
    matrix, b = torch.randn(ROWS, k), columns + 3
    packed = packing.pack(matrix, storage)
    vectors = torch.zeros(b, packed.columns, dtype=factor)
    vectors[:, :k] = torch.randn(b, k)
    step, stage = _step(rows, columns, storage.itemsize, factor.itemsize)
    span = -(-packed.columns // (spans * step)) * step
    spans = -(-packed.columns // span)
    sums = torch.full((spans, b, ROWS), torch.nan)
    call = torch.tensor(list(bytes(Call(b))), dtype=torch.uint8)
    arguments = ProductArguments(
        call=call.data_ptr(),
        matrix=packed.weights.data_ptr(),
        scales=None if packed.scales is None else packed.scales.data_ptr(),
        rows=ROWS,
        columns=packed.columns,
        vectors=vectors.data_ptr(),
        span=span,
        sums=sums.data_ptr(),
        capacity=b,
    )
    stages = 3
    shared = max(stages * stage, 4 * _slices(rows, columns) * columns * (rows + 4))
    sizes = Sizes(torch.bfloat16, storage, factor, 8, 1, 1, 4)
    kernel = _cuda.kernel(
        launches.PRODUCT,
        "product",
        sizes.product(Tiling(rows, columns, stages, span, spans, shared), "SUMS"),
        sums.get_device(),
        shared,
    )
    kernel.launch((-(-ROWS // rows), -(-b // columns), spans), 256, arguments, shared)

    exact = packed.weights.double()
    if packed.scales is not None:
        exact = exact * packed.scales.double()[:, None]
    wanted = vectors.double() @ exact.T
    error = (sums.double().sum(0) - wanted).norm() / wanted.norm()
    assert float(error) < 1e-6


def test_int8_weights_are_those_of_the_cpu():
    why_not = _native.unavailable()
    if why_not is not None:
        pytest.skip(why_not)
    matrix = (
        torch.randn(40, 48, device="cpu") * torch.logspace(-30, 30, 40, device="cpu")[:, None]
    )
    matrix[3] = 0
    matrix[4, 7] = torch.nan
    weights = torch.empty(40, 48, dtype=torch.int8, device="cpu")
    scales = torch.empty(40, device="cpu")
    step_library().quantise(matrix, weights, scales)
    packed = packing.pack(matrix, torch.int8)
    assert torch.equal(packed.weights, weights)
    torch.testing.assert_close(packed.scales, scales, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("readers", [0, 1, 64])
@pytest.mark.parametrize("b", [1, 3, 16, 100, 1000])
@pytest.mark.parametrize(("weight", "factor"), [(4, 4), (2, 2), (1, 2)])
@pytest.mark.parametrize("shared", [99 * 1024, 227 * 1024])
def test_a_tiling_covers_the_product(weight, factor, b, readers, shared):
    for rows, columns in ((8192, 2048), (160, 4096), (16, 16), (50280, 768)):
        cut = tile(rows, columns, b, weight, factor, GPU(132, shared), readers)
        x, y, z = cut.grid(rows, b)
        assert (x - 1) * cut.rows < rows <= x * cut.rows
        assert (y - 1) * cut.columns < b <= y * cut.columns
        assert (z - 1) * cut.span < columns <= z * cut.span
        assert z == 1 or readers
        step, stage = _step(cut.rows, cut.columns, weight, factor)
        assert cut.span % step == 0
        assert cut.stages * stage <= cut.shared_bytes <= min(shared, 110 * 1024)
        assert cut.stages >= 2
        assert factor == 2 or cut.columns <= 16


@pytest.mark.parametrize("b", [32, 48, 128, 1000])
@pytest.mark.parametrize("n", [16, 32])
@pytest.mark.parametrize(("d", "r"), [(1536, 48), (4096, 128), (8192, 256), (96, 3)])
@pytest.mark.parametrize("shared", [99 * 1024, 227 * 1024])
def test_a_tiling_covers_the_scan(shared, d, r, n, b):
    cut = tile_scan(b, d, n, r, GPU(132, shared))
    x, y, _ = cut.grid(d, b)
    assert (x - 1) * 128 < d <= x * 128
    assert (y - 1) * cut.sequences < b <= y * cut.sequences
    assert cut.slots >= 2
    assert cut.shared_bytes <= min(shared, 110 * 1024)
    assert x * y <= 2 * 132 or cut.sequences == 32


def test_a_library_multiplies_for_many_sequences_of_sizes_that_registers_hold():
    assert takes_library(32, 16, 256, 8192, 5)
    assert takes_library(32, 32, 128, 8192, 5)
    for wrong in (
        (16, 16, 256, 8192, 4),  # few sequences
        (32, 16, 257, 8192, 4),
        (32, 32, 129, 8192, 4),
        (32, 24, 1, 8192, 4),
        (32, 16, 1, 8200, 4),
        (32, 16, 256, 8192, 6),
    ):
        assert not takes_library(*wrong)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("columns", [256, 96])
def test_sums_over_spans_add_up_to_the_product(columns, dtype):
    vectors = torch.randn(5, columns).bfloat16()
    matrix = torch.randn(7, columns).bfloat16()
    spans = library_spans(columns)
    assert spans == (2 if columns == 256 else 1)
    out = torch.full((spans, 5, 7), torch.nan, dtype=dtype)
    Multiplication("out_proj", vectors, matrix, out).run()
    wanted = vectors.double() @ matrix.double().T
    error = (out.double().sum(0) - wanted).norm() / wanted.norm()
    assert float(error) < (1e-2 if dtype == torch.bfloat16 else 1e-5)


def test_rooms_and_groups():
    for b in range(1, 400):
        assert b <= room(b) <= max(2 * b, b + 127)
    assert [group(b, 16) for b in (1, 2, 3, 4, 128)] == [1, 2, 2, 4, 4]
    assert [group(8, n) for n in (1, 16, 17, 32, 64, 256)] == [4, 4, 2, 2, 1, 1]
