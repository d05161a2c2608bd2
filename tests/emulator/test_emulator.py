"""The emulator does what a GPU would, and finds what a GPU would not tell."""

import ctypes
from pathlib import Path

import pytest
import torch

from tests import emulator

SOURCE = Path(__file__).with_name("checks.cu")

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.skipif(emulator.unavailable() is not None, reason=str(emulator.unavailable())),
]


class Arguments(ctypes.Structure):
    _fields_ = [("x", ctypes.c_void_p), ("y", ctypes.c_void_p), ("n", ctypes.c_int64)]


def run(entry, x, y, threads=64, blocks=1, shared_bytes=0, early=0):
    arguments = Arguments(x.data_ptr(), y.data_ptr(), x.numel())
    defines = (("EARLY", str(early)),)
    emulator.run(SOURCE, entry, defines, (blocks, 1, 1), threads, arguments, shared_bytes)
    return y


def test_blocks_sum_what_their_threads_bring():
    x = torch.randn(2000)
    sums = run("sums", x, torch.zeros(4), threads=128, blocks=4, shared_bytes=2048)
    wanted = torch.cat([x, torch.zeros(48)]).view(4, 512).sum(1)
    torch.testing.assert_close(sums, wanted, rtol=1e-5, atol=1e-4)


def test_what_was_not_waited_for_is_nan():
    x = torch.randn(2048)
    sums = run("sums", x, torch.zeros(4), 128, blocks=4, shared_bytes=2048, early=2)
    assert sums.isnan().all()


def test_shuffles_reach_the_lanes_they_name():
    x = torch.arange(64.0)
    up, down, one = run("neighbours", x, torch.zeros(3, 64)).view(3, 2, 32)
    lanes = torch.arange(32)
    first = torch.tensor([[0], [32]])
    assert torch.equal(up, first + torch.where(lanes < 2, lanes, lanes - 2))
    assert torch.equal(down, first + torch.where(lanes > 29, lanes, lanes + 2))
    assert torch.equal(one, (first + 5).expand(2, 32).float())


def test_shared_memory_that_nobody_wrote_is_nan():
    y = run("unwritten", torch.zeros(1), torch.zeros(64))
    assert torch.equal(y[:32], torch.ones(32))
    assert y[32:].isnan().all()


def test_a_missing_barrier_shows():
    x = torch.randn(64)
    y = run("races", x, torch.zeros(64))
    assert not torch.equal(y, x.flip(0))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("diverges", "thread 39 waits at __syncthreads and thread 40 has returned"),
        ("miscounts", "every thread waits at barrier_of, which is for another number"),
        ("shuffles_alone", "a barrier that some threads never reach: .* waits at a shuffle"),
        ("unaligned", r"unaligned: an address that is no multiple of .* at .*checks.cu:\d+"),
        ("beyond", r"an index beyond its array at .*, in block \(0, 0, 0\), thread"),
        ("null", "a null pointer"),
    ],
)
def test_a_wrong_kernel_is_named_with_what_it_does(entry, message):
    with pytest.raises(emulator.KernelError, match=message):
        run(entry, torch.zeros(64), torch.zeros(64))
    # and the next one runs as if nothing had been
    run("neighbours", torch.zeros(64), torch.zeros(192))


def test_a_launch_that_no_gpu_takes_is_refused():
    x = torch.zeros(64)
    with pytest.raises(emulator.KernelError, match="up to 1024, got 40"):
        run("unwritten", x, x, threads=40)
    with pytest.raises(emulator.KernelError, match="no GPU has 300000 bytes"):
        run("unwritten", x, x, shared_bytes=300000)
    kernel = emulator.kernel(SOURCE, "unwritten", (("EARLY", "0"),))
    with pytest.raises(emulator.KernelError, match="no GPU takes the grid"):
        kernel.launch((1, 70000, 1), 64, Arguments())
    with pytest.raises(emulator.KernelError, match=r"arguments have 24 bytes, .* Python 8"):
        kernel.launch((1, 1, 1), 64, ctypes.c_int64())


def test_16_bit_numbers_are_pytorchs():
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    edges = torch.tensor([65519.9, 65520.0, 1e-8, 3e-8, 6.1e-5, 3.4e38, torch.inf, torch.nan])
    x = torch.cat([torch.randn(5000) * 10.0 ** torch.randint(-9, 6, (5000,)), edges, -edges])
    y = run("converts", x, torch.zeros(2 * 2**16 + 2 * len(x)))
    for k, dtype in enumerate((torch.bfloat16, torch.float16)):
        wide = y[k * 2**16 :][: 2**16]
        torch.testing.assert_close(
            wide, bits.view(dtype).float(), rtol=0, atol=0, equal_nan=True
        )
        rounded = y[2 * 2**16 + k * len(x) :][: len(x)]
        torch.testing.assert_close(rounded, x.to(dtype).float(), rtol=0, atol=0, equal_nan=True)
