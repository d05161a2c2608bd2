"""The kernels of published sizes compile, without spills, for every GPU. None is needed."""

import re

import pytest
import torch

from mambakit.generation.gpu_step.launches import Sizes, specialisations
from mambakit.generation.gpu_step.packing import factor
from mambakit.generation.gpu_step.tiling import GPU
from mambakit.ops import _cuda

H200 = GPU(132, 227 * 1024)
VOCABULARY = 50280

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
SHORT, HALF, ROUNDED, INT8, LONG = (
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.int8),
    (torch.float32, torch.float32),
)


def compilations():
    """1.4B in all dtypes; other sizes and architectures in one, of many sequences in more."""
    wanted = [("sm_90", "1.4B", kind, b) for kind in (SHORT, INT8, LONG) for b in (1, 16, 128)]
    wanted += [("sm_90", model, SHORT, 64) for model in ("130M", "2.8B", "7B")]
    wanted += [(arch, "1.4B", SHORT, b) for arch in ("sm_80", "sm_100") for b in (1, 128)]
    wanted += [("sm_90a", "1.4B", SHORT, 64), ("sm_90a", "most", HALF, 64)]
    wanted += [(arch, "most", ROUNDED, 128) for arch in ("sm_80", "sm_90a", "sm_100")]
    seen = set()
    for arch, model, (dtype, storage), b in wanted:
        m, d, n, r, w = MODELS[model]
        sizes = Sizes(dtype, storage, factor(dtype, storage), m, n, r, w)
        for build in specialisations(sizes, d, VOCABULARY, b, H200):
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
    assert not any(map(int, spilled))
