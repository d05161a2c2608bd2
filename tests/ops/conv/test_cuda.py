"""The convolution's CUDA kernels: on a GPU if one was asked for, else on the emulator."""

from itertools import pairwise

import pytest
import torch

from mambakit.ops.conv import cuda, reference
from mambakit.ops.conv.cuda import launch

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# Rows on multiples of 16 bytes and others, one tile of channels and several with a part of one,
# sequences shorter than the window, runs of one step, splits of time, windows of every kind.
SIZES = [
    (2, 9, 3, 4),
    (1, 131, 16, 4),
    (2, 70, 264, 4),
    (1, 40, 300, 3),
    (3, 2, 33, 4),
    (5, 1, 32, 4),
    (2, 33, 8, 1),
    (1, 35, 16, 7),
    (1, 40, 5, 12),
    (2, 0, 5, 4),
    (0, 4, 3, 4),
]


@pytest.mark.parametrize(
    ("dtype", "silu", "size"),
    [
        *((torch.float32, True, size) for size in SIZES),
        # the rest differs in how numbers are loaded, and in one line
        *(
            (dtype, True, size)
            for dtype in DTYPES
            if dtype != torch.float32
            for size in SIZES[:4]
        ),
        *((torch.float32, False, size) for size in SIZES[:2]),
    ],
    ids=str,
)
def test_equals_the_reference(emulated, draw, assert_near, dtype, silu, size):
    b, l, d, w = size
    inputs = [t.to(emulated) for t in draw(*size, dtype=dtype)]
    dy, dlast = torch.randn(b, l, d, dtype=dtype), torch.randn(b, d, w - 1, dtype=dtype)
    dy, dlast = dy.to(emulated), dlast.to(emulated)

    exact = [t.double().requires_grad_() for t in inputs]
    wanted = reference.conv(*exact, silu)
    gradients = torch.autograd.grad(wanted, exact, (dy.double(), dlast.double()))

    y, last = cuda.forward(*inputs, silu)
    assert_near(y, wanted[0])
    assert torch.equal(last.double(), wanted[1])
    got = cuda.backward(dy, dlast, *inputs, silu)
    for name, g, exact_g in zip(("x", "weight", "bias", "state"), got, gradients, strict=True):
        scale = exact_g.abs().max() if exact_g.numel() else 1.0
        assert_near(g / scale, exact_g / scale, message=f"gradient of {name}")


def test_what_is_absent_is_zero_or_not_wanted(emulated, draw, assert_near):
    x, weight, bias, state = (t.to(emulated) for t in draw(l=20, d=16, dtype=torch.float32))
    zeros = torch.zeros_like(bias), torch.zeros_like(state)
    y, last = cuda.forward(x, weight, None, None, True)
    wanted = cuda.forward(x, weight, *zeros, True)
    assert torch.equal(y, wanted[0])
    assert torch.equal(last, wanted[1])
    dx, dweight, dbias, dstate = cuda.backward(y, None, x, weight, None, None, True)
    other = cuda.backward(y, torch.zeros_like(last), x, weight, *zeros, True)
    assert dbias is dstate is None
    assert torch.equal(dx, other[0])
    assert torch.equal(dweight, other[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_slices_are_read_where_they_lie(emulated, draw, dtype):
    """As in_proj leaves them: aligned, and starting in the middle of a vector."""
    b, l, d = 2, 20, 24
    _, weight, bias, _ = (t.to(emulated) for t in draw(d=d, dtype=dtype))
    wide = torch.randn(b, l, 3 * d, dtype=dtype).to(emulated)
    for start in (d, 1):
        x = wide[..., start : start + d]
        assert launch._rows(x, dtype).data_ptr() == x.data_ptr()
        dy = wide[:, :, : 2 * d : 2]
        y, last = cuda.forward(x, weight, bias, None, True)
        dense = cuda.forward(x.contiguous(), weight, bias, None, True)
        assert torch.equal(y, dense[0])
        assert torch.equal(last, dense[1])
        got = cuda.backward(dy, None, x, weight, bias, None, True)[0]
        again = cuda.backward(dy, None, x.contiguous(), weight, bias, None, True)[0]
        assert torch.equal(got, again)


@pytest.mark.parametrize("dtype", DTYPES)
def test_parameters_may_have_any_dtype_and_strides(emulated, draw, assert_near, dtype):
    x, weight, bias, state = (t.to(emulated) for t in draw(d=16, dtype=torch.float32))
    given = weight.to(dtype).t().contiguous().t(), bias.to(dtype)
    same = weight.to(dtype).float(), bias.to(dtype).float()
    assert torch.equal(
        cuda.forward(x, *given, state, True)[0], cuda.forward(x, *same, state, True)[0]
    )
    dy = torch.randn(x.shape, dtype=x.dtype).to(emulated)
    got = cuda.backward(dy, None, x, *given, state, True)
    wanted = cuda.backward(dy, None, x, *same, state, True)
    for g, other in zip(got, wanted, strict=True):
        assert_near(g, other)
    assert got[1].dtype == got[2].dtype == dtype
    assert got[1].is_contiguous()


@pytest.mark.parametrize("start", [0, 8, 1])
def test_the_gradient_of_x_may_go_into_a_wider_tensor(emulated, draw, start):
    x, weight, bias, state = (t.to(emulated) for t in draw(l=20, d=16, dtype=torch.float32))
    wanted = cuda.backward(x, None, x, weight, bias, state, True)
    wide = torch.zeros(2, 20, 40, device=emulated)
    there = wide[..., start : start + 16]
    found = cuda.backward(x, None, x, weight, bias, state, True, dx=there)
    assert found[0] is there
    assert torch.equal(there, wanted[0])
    assert wide.count_nonzero() == wanted[0].count_nonzero()
    across = torch.zeros(2, 16, 20, device=emulated).mT
    assert cuda.backward(x, None, x, weight, bias, state, True, dx=across)[0] is not across


def test_sums_over_a_large_batch_keep_their_digits(emulated):
    """One step of many rows: as many partial sums, and the reference adds in pairs."""
    source = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=source, device="cpu").to(emulated)

    b = 6000
    x, dy, weight, bias = draw(b, 1, 2), draw(b, 1, 2) + 0.5, draw(2, 4), draw(2)

    def error(gradients):
        return [(g - t).square().mean().sqrt() for g, t in zip(gradients, truth, strict=True)]

    def by_autograd(dtype):
        leaves = [t.to(dtype).requires_grad_() for t in (weight, bias)]
        y, _ = reference.conv(x.to(dtype), *leaves, None, True)
        return torch.autograd.grad(y, leaves, dy.to(dtype))

    truth, plain = by_autograd(torch.float64), by_autograd(torch.float32)
    ours = cuda.backward(dy, None, x, weight, bias, None, True)[1:3]
    for our, their in zip(error(ours), error(plain), strict=True):
        assert our <= 2 * their


def test_cuts_fill_the_gpu_and_cover_all_steps():
    for units, l, room in [(64, 2048, 528), (1, 7, 264), (8, 65536, 528), (4096, 512, 264)]:
        for warps, past in ((4, 3), (8, 3)):
            splits, steps = launch._cut(units, l, warps, past, room)
            assert (splits - 1) * steps * warps < l <= splits * steps * warps
            if l * units > 100 * room:
                waves = units * splits / room
                assert waves / -(-units * splits // room) > 0.9


@pytest.fixture
def pack(emulated):
    """Draw a pack's operands, what arrives at its results, and ``cu_seqlens``."""

    def make(lengths, d, w, dtype=torch.float32):
        source = torch.Generator("cpu").manual_seed(0)
        s, l = len(lengths), sum(lengths)
        shapes = (1, l, d), (d, w), (d,), (s, d, w - 1), (1, l, d), (s, d, w - 1)
        drawn = (torch.randn(shape, generator=source, device="cpu") for shape in shapes)
        *given, dy, dlast = (t.to(emulated, dtype) for t in drawn)
        return given, dy, dlast, torch.tensor([0, *lengths], device="cpu").cumsum(0)

    return make


# Sequences shorter than the window and longer than a block's steps, in one of several.
LENGTHS = (1, 2, 40, 3, 170, 1, 1, 65)


@pytest.mark.parametrize(
    ("d", "w", "dtype"),
    [(264, 4, torch.bfloat16), (3, 4, torch.float32), (16, 1, torch.float32),
     (5, 12, torch.float32)],
)  # fmt: skip
@pytest.mark.parametrize("with_state", [True, False])
def test_each_sequence_of_a_pack_is_what_it_is_alone(
    emulated, pack, assert_near, monkeypatch, d, w, dtype, with_state
):
    given, dy, dlast, cu_seqlens = pack(LENGTHS, d, w, dtype)
    x, weight, bias, state = given
    spans = list(enumerate(pairwise(cu_seqlens.tolist())))
    parts = [
        (x[:, a:b], weight, bias, state[k : k + 1] if with_state else None)
        for k, (a, b) in spans
    ]
    arriving = [(dy[:, a:b], dlast[k : k + 1]) for k, (a, b) in spans]
    alone = [cuda.forward(*part, True) for part in parts]
    back = [cuda.backward(*g, *part, True) for g, part in zip(arriving, parts, strict=True)]
    sums = [torch.stack([g[i].double() for g in back]).sum(0) for i in (1, 2)]
    if not with_state:
        state = None
    for most in (None, 2, 1000):
        if most is not None:
            monkeypatch.setattr(launch, "_cut", lambda *_, most=most: (1, most))
        y, last = cuda.forward(x, weight, bias, state, True, cu_seqlens=cu_seqlens)
        assert torch.equal(y, torch.cat([one[0] for one in alone], 1))
        assert torch.equal(last, torch.cat([one[1] for one in alone]))
        dx, dweight, dbias, dstate = cuda.backward(
            dy, dlast, x, weight, bias, state, True, cu_seqlens=cu_seqlens
        )
        assert torch.equal(dx, torch.cat([g[0] for g in back], 1))
        if with_state:
            assert torch.equal(dstate, torch.cat([g[3] for g in back]))
        for found, wanted in zip((dweight, dbias), sums, strict=True):
            scale = wanted.abs().max()
            assert_near(found / scale, wanted / scale)


def test_a_nan_stays_in_its_sequence_of_a_pack(emulated, pack):
    (x, weight, bias, state), dy, dlast, cu_seqlens = pack(LENGTHS, 16, 4)

    def run(x, dy):
        call = (x, weight, bias, state, True)
        y, last = cuda.forward(*call, cu_seqlens=cu_seqlens)
        dx, _, _, dstate = cuda.backward(dy, dlast, *call, cu_seqlens=cu_seqlens)
        return y, dx, last, dstate

    clean = run(x, dy)
    a, b = cu_seqlens[2:4].tolist()
    others = [k for k in range(len(LENGTHS)) if k != 2]
    for spoilt in (0, 1):
        pair = [x.clone(), dy.clone()]
        pair[spoilt][0, a:b] = torch.nan
        found = run(*pair)
        for i in (0, 1):
            assert torch.equal(found[i][:, :a], clean[i][:, :a])
            assert torch.equal(found[i][:, b:], clean[i][:, b:])
            assert torch.equal(found[i + 2][others], clean[i + 2][others])
