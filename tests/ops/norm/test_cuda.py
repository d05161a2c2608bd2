"""RMSNorm's CUDA kernel: on a GPU if one was asked for, else on the emulator."""

import pytest
import torch
import torch.nn.functional as F

from mambakit.ops.norm import cuda

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Packets and single numbers, one warp to a row and many, more than registers hold.
WIDTHS = [1, 7, 8, 1000, 2048, 16384, 20000, 20001]


@pytest.fixture
def draw(emulated):
    """Draw numbers on the device that the kernel's host code takes."""
    source = torch.Generator("cpu").manual_seed(0)

    def make(*shape, dtype=torch.float32):
        return torch.randn(shape, generator=source, device="cpu").to(emulated, dtype)

    return make


def plain(x, gain, eps):
    """RMSNorm by PyTorch, as the module writes it."""
    return F.rms_norm(x.float(), gain.shape, gain.float(), eps).to(gain.dtype)


def exact(x, gain, eps):
    """RMSNorm in float64."""
    x, gain = x.double(), gain.double()
    return gain * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def check(got, x, gain, eps):
    """Assert an error at most twice that of PyTorch's own in the same precision."""
    assert got.dtype == gain.dtype
    assert got.shape == x.shape
    wanted = exact(x, gain, eps)
    error, other = ((y.double() - wanted).norm() for y in (got, plain(x, gain, eps)))
    assert error <= 2 * other + 1e-7 * wanted.norm()


@pytest.mark.parametrize("addend", [None, *DTYPES], ids=str)
@pytest.mark.parametrize("stream", DTYPES, ids=str)
@pytest.mark.parametrize("result", DTYPES, ids=str)
def test_every_pair_of_dtypes(draw, stream, addend, result):
    x, gain = draw(3, 5, 72, dtype=stream), draw(72, dtype=result)
    if addend is not None:
        y = draw(3, 5, 72, dtype=addend)
        total, normalised = cuda.add_rms_norm(x, y, gain, 0.1)
        assert total.dtype == (x + y).dtype
        assert torch.equal(total, x + y)
        check(normalised, x + y, gain, 0.1)
    else:
        check(cuda.rms_norm(x, gain, 0.1), x, gain, 0.1)


@pytest.mark.parametrize("rows", [1, 6])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(
    ("stream", "addend"),
    [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16), (torch.float32, None)],
    ids=str,
)
def test_every_width(draw, rows, width, stream, addend):
    x, gain = draw(rows, width, dtype=stream), draw(width, dtype=torch.bfloat16)
    if addend is not None:
        y = draw(rows, width, dtype=addend)
        total, normalised = cuda.add_rms_norm(x, y, gain, 1e-5)
        assert torch.equal(total, x + y)
        check(normalised, x + y, gain, 1e-5)
    else:
        check(cuda.rms_norm(x, gain, 1e-5), x, gain, 1e-5)


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)])
def test_no_rows_are_no_rows(draw, shape):
    x, gain = draw(*shape), draw(8, dtype=torch.bfloat16)
    assert cuda.rms_norm(x, gain, 1e-5).shape == shape
    total, normalised = cuda.add_rms_norm(x, x, gain, 1e-5)
    assert total.shape == normalised.shape == shape
    assert (total.dtype, normalised.dtype) == (torch.float32, torch.bfloat16)


def test_a_vector_is_a_row(draw):
    x, gain = draw(40), draw(40)
    check(cuda.rms_norm(x, gain, 1e-5), x, gain, 1e-5)


def test_zeros_stay_zeros(draw):
    x, gain = draw(3, 48) * 0, draw(48)
    assert not cuda.rms_norm(x, gain, 1e-5).any()


@pytest.mark.parametrize("width", [40, 7, 2048])
def test_a_nan_stays_in_its_row(draw, width):
    x, gain = draw(9, width), draw(width)
    clean = cuda.add_rms_norm(x, x, gain, 1e-5)
    x[4, width // 2] = torch.nan
    total, normalised = cuda.add_rms_norm(x, x, gain, 1e-5)
    others = [0, 1, 2, 3, 5, 6, 7, 8]
    assert torch.equal(total[others], clean[0][others])
    assert torch.equal(normalised[others], clean[1][others])
    assert normalised[4].isnan().all()
    assert total[4].isnan().sum() == 1


@pytest.mark.parametrize("start", [0, 8, 1])
def test_rows_are_read_where_they_lie(draw, start):
    """Slices of wider rows, some of them not on multiples of 16 bytes; and the last of each."""
    wide, gain = draw(4, 6, 80), draw(40)
    x = wide[..., start : start + 40]
    total, normalised = cuda.add_rms_norm(x, x, gain, 1e-5)
    assert torch.equal(total, x + x)
    check(normalised, x + x, gain, 1e-5)
    last = wide[:, -1:, start : start + 40]
    assert cuda._rows(last, 40)[0].data_ptr() == last.data_ptr()
    check(cuda.rms_norm(last, gain, 1e-5), last, gain, 1e-5)


def test_any_other_layout_is_read_too(draw):
    x, gain = draw(5, 16, 3).transpose(1, 2), draw(32)[::2]
    check(cuda.rms_norm(x, gain, 1e-5), x, gain, 1e-5)
    row = draw(16).expand(4, 16)
    check(cuda.rms_norm(row, gain, 1e-5), row, gain, 1e-5)


def test_cuts_hold_whole_rows_in_registers_up_to_a_width():
    for vector_of in DTYPES:
        for width in (1, 8, 2048, 16384, 16392, 100_000):
            chosen = cuda.build(vector_of, vector_of, vector_of, width, True)
            said = dict(chosen.defines)
            held = 32 * int(said["WARPS"]) * int(said["PACKETS"]) * int(said["VECTOR"])
            assert (said["LONG"] == "1") == (width > 16384)
            assert said["LONG"] == "1" or width <= held
            assert chosen.threads == 32 * int(said["WARPS"]) * int(said["ROWS"]) <= 1024
