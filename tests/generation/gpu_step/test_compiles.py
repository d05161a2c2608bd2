"""The step's kernels compile, without spills, for three generations of GPUs. None is needed.

They are built for a model's sizes and a number of sequences, and not all of these are here: the
1.4B model is, in every dtype with every storage of its matrices, for each architecture; other
sizes are in one dtype or two, most of them for sm_90a. With other series of the compiler than
the one that the tests install some builds spill.
"""

import re

import pytest
import torch

from mambakit.generation.gpu_step.launches import Sizes, specialisations
from mambakit.generation.gpu_step.packing import factor
from mambakit.generation.gpu_step.tiling import GPU
from mambakit.ops import _cuda

# An A100, an H200, a B200: multiprocessors, and bytes of shared memory for a block.
GPUS = {
    "sm_80": GPU(108, 163 * 1024),
    "sm_90a": GPU(132, 227 * 1024),
    "sm_100": GPU(148, 227 * 1024),
}
VOCABULARY = 50280
# of the compiler, as the extra dev has it
SERIES = (13, 5)

try:
    _cuda.version()
except RuntimeError as error:
    _MISSING = str(error)
else:
    _MISSING = ""

# Width, inner channels, states, rank, window: the published sizes, FalconMamba 7B's, and the
# most of everything that goes with a library's products.
MODELS = {
    "130M": (768, 1536, 16, 48, 4),
    "1.4B": (2048, 4096, 16, 128, 4),
    "2.8B": (2560, 5120, 16, 160, 4),
    "7B": (4096, 8192, 16, 256, 4),
    "most": (2048, 4096, 32, 128, 5),
}
# The model's dtype, and that of the matrices.
BF16, FP16, FP32, INT8 = torch.bfloat16, torch.float16, torch.float32, torch.int8
SHORT, HALF, ROUNDED = (BF16, BF16), (FP16, FP16), (FP32, BF16)
KINDS = (
    SHORT,
    HALF,
    (FP32, FP32),
    ROUNDED,
    (FP16, BF16),
    *((d, INT8) for d in (BF16, FP16, FP32)),
)


def compilations():
    """1.4B in every kind for each GPU, for one sequence and many; other sizes in one or two."""
    wanted = [(arch, "1.4B", kind, b) for arch in GPUS for kind in KINDS for b in (1, 128)]
    wanted += [("sm_90a", "1.4B", kind, 16) for kind in (SHORT, (BF16, INT8), (FP32, FP32))]
    wanted += [("sm_90a", model, SHORT, 64) for model in ("130M", "1.4B", "2.8B", "7B")]
    wanted += [("sm_90a", "most", HALF, 64), *((arch, "most", ROUNDED, 128) for arch in GPUS)]
    seen = set()
    for arch, model, (dtype, storage), b in wanted:
        m, d, n, r, w = MODELS[model]
        sizes = Sizes(dtype, storage, factor(dtype, storage), m, n, r, w)
        for build in specialisations(sizes, d, VOCABULARY, b, GPUS[arch]):
            if (arch, build) not in seen:
                seen.add((arch, build))
                source, defines = build
                name = "-".join((source.stem, *(value for _, value in defines)))
                yield pytest.param(*build, arch, id=f"{arch}-{name}")


@pytest.mark.skipif(bool(_MISSING), reason=_MISSING)
@pytest.mark.parametrize(("source", "defines", "arch"), list(compilations()))
def test_compiles_without_spills(source, defines, arch):
    compiled = _cuda.compile_with_log(source, defines, arch)
    assert compiled.cubin[:4] == b"\x7fELF"
    spilled = re.findall(r"(\d+) bytes spill stores", compiled.log)
    assert spilled
    if _cuda.version() == SERIES:
        assert not any(map(int, spilled))
