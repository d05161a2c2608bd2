"""Small calls of every CUDA kernel, for compute-sanitizer to watch: ``make gpu-test`` does.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer python -m tests.gpu_memory

Without PyTorch's cache every tensor is an allocation of its own, past whose end nothing may be
read or written.
"""

import sys
from collections.abc import Iterator

import torch
from torch import Tensor

from mambakit import MambaConfig, MambaLM
from mambakit.modules import RMSNorm
from mambakit.ops import causal_conv1d, selective_scan

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# b, l, d, n: one block and several, odd numbers of everything, one state and many; so long that
# more states are saved
SHAPES = [(1, 1, 1, 1), (2, 67, 83, 16), (2, 200, 40, 1), (1, 131, 17, 5), (1, 70, 33, 64)]
SHAPES += [(1, 300, 140, 16)]
PACK = [1, 40, 3, 100, 64]
# a warp, some and many to a row; more than registers hold; odd widths, and whole packets
NORMS = [(9, 7), (5, 40), (3, 1001), (3, 2048), (2, 16384), (2, 20000), (2, 20001)]


def scan(b: int, l: int, d: int, n: int, dtype: torch.dtype, ends: Tensor | None) -> None:
    """Scan forward and backward, with everything given."""
    sequences = b if ends is None else len(ends) - 1
    sizes = {"x": (b, l, d), "dt": (b, l, d), "A": (d, n), "B": (b, l, n), "C": (b, l, 1, n)}
    sizes |= {"D": (d,), "gate": (b, l, d), "dt_bias": (d,), "state": (sequences, d, n)}
    given = {k: torch.rand(*size, dtype=dtype, requires_grad=True) for k, size in sizes.items()}
    given["A"] = (-given["A"].detach().float()).requires_grad_()
    y, state = selective_scan(**given, dt_softplus=True, cu_seqlens=ends, backend="fused")
    (y.float().sum() + state.sum()).backward()
    assert all(t.grad is not None and t.grad.isfinite().all() for t in given.values())


def convolution(b: int, l: int, d: int, dtype: torch.dtype, ends: Tensor | None) -> None:
    """Convolve forward and backward, with everything given."""
    sequences = b if ends is None else len(ends) - 1
    sizes = (b, l, d), (d, 4), (d,), (sequences, d, 3)
    x, weight, bias, state = (torch.rand(*k, dtype=dtype, requires_grad=True) for k in sizes)
    y, last = causal_conv1d(
        x, weight, bias, activation="silu", state=state, cu_seqlens=ends, backend="fused"
    )
    (y.float().sum() + last.float().sum()).backward()
    assert all(t.grad.isfinite().all() for t in (x, weight, bias, state))


@torch.no_grad()
def norms(rows: int, m: int, dtype: torch.dtype) -> None:
    """Normalise a stream, and a sum whose rows lie in a wider tensor."""
    norm = RMSNorm(m, dtype=dtype)
    x, y = torch.rand(rows, m), torch.rand(rows, 2 * m, dtype=dtype)[:, m:]
    assert norm(x).isfinite().all()
    assert all(part.isfinite().all() for part in norm.after_sum(x, y))


def steps(dtype: torch.dtype, b: int, weights: str | None, n: int) -> None:
    """Read a few tokens one by one in the step that generation takes."""
    from mambakit.generation.stepping import stepper

    config = MambaConfig(d_model=40, n_layer=2, vocab_size=67, d_state=n, bias=True)
    model = MambaLM(config, dtype=dtype)
    with torch.no_grad():
        tokens = torch.randint(67, (b, 3))
        step, state = stepper(model, weights), model(tokens[:, :1]).state
        for t in (1, 2):
            logits, state = step(tokens[:, t], state)
    assert logits.isfinite().all()


def calls() -> Iterator[str]:
    """Make every call, and say after each what it was."""
    for dtype in FLOATS:
        for b, l, d, n in SHAPES:
            scan(b, l, d, n, dtype, None)
            convolution(b, l, d, dtype, None)
            yield f"scan and convolution of {(b, l, d, n)} in {dtype}"
        for rows, m in NORMS:
            norms(rows, m, dtype)
        yield f"norms in {dtype}"
        ends = torch.tensor([0, *PACK], device="cpu").cumsum(0)
        scan(1, sum(PACK), 48, 16, dtype, ends)
        convolution(1, sum(PACK), 48, dtype, ends)
        yield f"a pack in {dtype}"
        # from 17 sequences on, with 16 states, short models have kernels of their own
        for b, weights, n in ((1, None, 5), (3, "int8", 5), (40, None, 16)):
            steps(dtype, b, weights, n)
        yield f"steps in {dtype}"


def main(device: str) -> None:
    """Make every call on a device."""
    torch.manual_seed(0)
    with torch.device(device):
        for called in calls():
            if device == "cuda":
                torch.cuda.synchronize()
            print(called, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:] or ["cuda"])
