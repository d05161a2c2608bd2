"""CUDA kernels compile, without spills, for three generations of GPUs; what compiling promises.

None of this needs a GPU or a driver: the compiler is a library. A build is one set of dtypes,
sizes and options, and there are too many for all. For every architecture there is what models
ask for, and each kernel in every dtype and with each option. There are not: most pairs of
options, most numbers of states and widths, most mixtures of dtypes, and other GPUs of a
generation (sm_86, sm_89, sm_103, sm_120). float64 is for checking gradients: its builds may
spill. So may some builds of other series of the compiler than the one that the tests install.
"""

import ctypes
import importlib
import os
import re

import pytest
import torch

from mambakit.ops import _cuda, _spans, causal_conv1d, selective_scan
from mambakit.ops.conv.cuda import launch as conv
from mambakit.ops.norm import cuda as norm

_FORWARD, _BACKWARD = (
    importlib.import_module(f"mambakit.ops.scan.cuda.{name}")
    for name in ("forward", "backward")
)
BUILDS = [
    (_spans.SOURCE, ()),
    *conv.specialisations(),
    *((norm.SOURCE, defines) for defines in norm.specialisations()),
    *((_FORWARD.SOURCE, defines) for defines in _FORWARD.specialisations()),
    *((_BACKWARD.SOURCE, defines) for defines in _BACKWARD.specialisations()),
]

# Bytes of shared memory that a block may have.
ARCHITECTURES = {"sm_80": 163 * 1024, "sm_90a": 227 * 1024, "sm_100": 227 * 1024}
# of the compiler, as the extra dev has it
SERIES = (13, 5)
# registers are handed over there alone
_HANDS_OVER = "sm_90a"


def scan(
    x="bf16", dt=None, coefficients=None, *, n=16, softplus=1, gate=1, constant=0, aligned=1,
    packed=0,
):  # fmt: skip
    """Say what a scan's kernels are specialised on, as ``operands.Call`` does."""
    defines = {
        "STATES": n,
        "X_TYPE": x,
        "DT_TYPE": dt or x,
        "COEFFICIENT_TYPE": "float" if constant else coefficients or x,
        "SOFTPLUS": softplus,
        "GATE": gate,
        "CONSTANT_B": constant,
        "CONSTANT_C": constant,
        "ALIGNED": aligned,
        "ALIGNED_COEFFICIENTS": int(aligned and n % 4 == 0),
    } | ({"PACKED": 1} if packed else {})
    return tuple((name, str(value)) for name, value in defines.items())


_DTYPES = ("bf16", "fp16", "float")
_OPTIONS = (
    {}, {"n": 1}, {"packed": 1}, {"aligned": 0}, {"constant": 1}, {"softplus": 0, "gate": 0},
)  # fmt: skip
SCANS = [
    *(scan(dtype, **option) for dtype in _DTYPES for option in _OPTIONS),
    scan("bf16", "float", "float"),
    scan("float", "bf16", "bf16"),
    scan(n=5),
    scan("double"),
]
_CONVOLUTIONS = (
    (4, True, True, True),  # width, SiLU, aligned, packed
    (4, False, True, False),
    (2, True, True, False),
    (9, True, True, False),
)


def options(arch):
    """Yield builds that the kernels choose on a GPU of the architecture for rarer calls."""
    room = ARCHITECTURES[arch]
    gpu = _BACKWARD.GPU(room, room + 1024, arch == _HANDS_OVER)
    for kinds in SCANS:
        states = int(dict(kinds)["STATES"])
        for wide in (0, 4) if _FORWARD._may_be_wide(kinds, room) else (0,):
            narrow = _FORWARD._narrow(states, wide)[0]
            yield _FORWARD.SOURCE, _FORWARD._specialised(kinds, wide, narrow).defines
        given = dict(kinds)
        fewer = given["X_TYPE"] == "bf16" and states == 16 and "PACKED" not in given
        for steps in ("64", "32") if fewer else ("64",):
            saved = (("CHECKPOINT_STEPS", steps), *kinds)
            yield _BACKWARD.SOURCE, _BACKWARD._choose(saved, 2048, gpu).defines
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        for width, silu, aligned, packed in _CONVOLUTIONS:
            given = dtype, width, silu, aligned, packed
            forward = conv.PACKED_FORWARD_SHAPE if packed else conv.FORWARD_SHAPE
            yield conv.FORWARD, conv.build(forward, *given).defines
            yield conv.BACKWARD, conv.build(conv.BACKWARD_SHAPE, *given).defines


try:
    _cuda.version()
except RuntimeError as error:
    _MISSING = str(error)
else:
    _MISSING = ""
needs_nvrtc = pytest.mark.skipif(bool(_MISSING), reason=_MISSING)


def name_of(build):
    source, defines = build
    return "-".join((source.parent.parent.name, source.stem, *(value for _, value in defines)))


def compilations():
    """Every build for every architecture that has what it needs."""
    for arch, room in ARCHITECTURES.items():
        for build in dict.fromkeys((*BUILDS, *options(arch))):
            defines = dict(build[1])
            fits = int(defines.get("SHARED_BYTES", 0)) <= room
            if fits and (arch == _HANDS_OVER or defines.get("HAND_OVER") != "1"):
                yield pytest.param(build, arch, id=f"{arch}-{name_of(build)}")


@needs_nvrtc
@pytest.mark.parametrize(("build", "arch"), list(compilations()))
def test_compiles_without_spills(build, arch):
    compiled = _cuda.compile_with_log(*build, arch)
    assert compiled.cubin[:4] == b"\x7fELF"
    entry, found = "", {}
    for line in compiled.log.splitlines():
        if named := re.search(r"entry function '(\w+)'", line):
            entry = named[1]
        if told := re.search(r"(\d+) bytes spill stores", line):
            found[entry] = int(told[1])
    assert found
    if "double" not in dict(build[1]).values() and _cuda.version() == SERIES:
        assert not any(found.values()), f"bytes spilled: {found}"


KERNEL = """#include "_cuda.cuh"
#include "numbers.cuh"
struct Arguments { float* y; };
KERNEL(32, 1) fill(const __grid_constant__ Arguments a) { a.y[threadIdx.x] = ONE + TWO; }
"""


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A kernel whose header lies beside it, and a cache folder of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "numbers.cuh").write_text("#define ONE 1.0f\n")
    path = tmp_path / "fill.cu"
    path.write_text(KERNEL)
    _cuda._cubin.cache_clear()
    yield path
    _cuda._cubin.cache_clear()


@pytest.fixture
def compiled(monkeypatch):
    """What has been compiled: a list that grows."""
    calls, plain = [], _cuda.compile

    def counted(*arguments):
        calls.append(arguments)
        return plain(*arguments)

    monkeypatch.setattr(_cuda, "compile", counted)
    return calls


def build(source, defines=(("TWO", "2.0f"),), arch="sm_90"):
    """Ask for machine code as a new process would."""
    _cuda._cubin.cache_clear()
    return _cuda._cubin(source, defines, arch)


@needs_nvrtc
def test_machine_code_is_kept_until_anything_changes(source, compiled):
    first = build(source)
    assert build(source) == first
    assert len(compiled) == 1
    build(source, arch="sm_80")
    build(source, (("TWO", "3.0f"),))
    (source.parent / "numbers.cuh").write_text("#define ONE 4.0f\n")
    assert build(source) != first
    source.write_text(KERNEL + "// a new line\n")
    build(source)
    assert len(compiled) == 5
    kept = list(_cuda.cache_folder().iterdir())
    assert [path.suffix for path in kept] == [".cubin"] * 5


@pytest.mark.parametrize(("best", "arch"), [(80, "sm_80"), (90, "sm_90a"), (100, "sm_100")])
def test_registers_are_handed_over_on_hopper_alone(monkeypatch, best, arch):
    monkeypatch.setattr(_cuda, "_best_arch", lambda _: best)
    _cuda._arch.cache_clear()
    assert _cuda._arch(0) == arch
    assert _cuda.hands_over_registers(0) == (best == 90)
    _cuda._arch.cache_clear()


@needs_nvrtc
@pytest.mark.parametrize("damage", [b"", b"nonsense", None])
def test_a_damaged_file_is_compiled_again(source, compiled, damage):
    first = build(source)
    (path,) = _cuda.cache_folder().iterdir()
    path.write_bytes(path.read_bytes()[:-1] if damage is None else damage)
    assert build(source) == first
    assert build(source) == first
    assert len(compiled) == 2


@needs_nvrtc
def test_a_folder_that_cannot_be_written_is_done_without(source, compiled, monkeypatch):
    obstacle = source.parent / "file"
    obstacle.write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(obstacle))
    assert build(source) == build(source)
    assert len(compiled) == 2


def test_without_a_home_nothing_is_kept(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert _cuda.cache_folder() is None


@needs_nvrtc
def test_the_compilers_words_are_in_the_message(source):
    with pytest.raises(
        RuntimeError, match=r"NVRTC could not compile fill.cu for sm_90"
    ) as told:
        build(source, ())
    assert 'identifier "TWO" is undefined' in str(told.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_machine_without_a_gpu_says_so():
    assert _cuda.unavailable() in {
        "this PyTorch was built without CUDA",
        "there is no CUDA device",
    }
    with pytest.raises(RuntimeError, match=r"^fill: its CUDA kernel cannot run here: th"):
        _cuda.kernel(BUILDS[0][0], "fill", (), 0)


@pytest.fixture
def gpu(monkeypatch):
    """Pretend that there is a GPU, of a capability that the caller sets."""
    properties = {"capability": (9, 0)}
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: properties["capability"])
    monkeypatch.setattr(_cuda, "_compiler", lambda: (13, 0))
    _cuda.unavailable.cache_clear()
    yield properties
    _cuda.unavailable.cache_clear()


@needs_nvrtc
def test_an_old_gpu_is_told_what_it_lacks(gpu):
    assert _cuda.unavailable() is None
    _cuda.unavailable.cache_clear()
    gpu["capability"] = (7, 5)
    wanted = "the CUDA kernels need compute capability 8.0, and GPU has 7.5"
    assert _cuda.unavailable() == _cuda.unavailable(0) == wanted


@needs_nvrtc
def test_a_gpu_that_the_compiler_does_not_know_needs_a_newer_one(gpu):
    gpu["capability"] = (99, 0)
    assert re.fullmatch(
        r"NVRTC 13\.0 does not know compute capability 99\.0: pip install --upgrade .*",
        _cuda.unavailable(),
    )


def test_a_missing_compiler_names_the_extra(gpu, monkeypatch):
    sentence = "the CUDA kernels need cuda-bindings: pip install 'mambakit[cuda]'"
    monkeypatch.setattr(_cuda, "_compiler", lambda: sentence)
    assert _cuda.unavailable() == sentence
    with pytest.raises(RuntimeError, match=re.escape(sentence)):
        _cuda.version()


class Two(ctypes.Structure):
    _fields_ = [("first", ctypes.c_int64), ("second", ctypes.c_int64)]


@pytest.fixture
def driver(monkeypatch):
    """A driver that notes what it is asked, and a torch whose GPU 1 is current."""
    driver = pytest.importorskip("cuda.bindings.driver")
    noted = {"status": driver.CUresult.CUDA_SUCCESS, "context": 0, "set": []}

    def launch(*arguments):
        *plain, parameters, _ = arguments
        address = ctypes.c_void_p.from_address(parameters).value
        both = Two.from_address(address)
        noted["launch"] = (*plain, both.first, both.second)
        return (noted["status"],)

    def choose(context):
        noted["set"].append(context)
        return (driver.CUresult.CUDA_SUCCESS,)

    good = driver.CUresult.CUDA_SUCCESS
    monkeypatch.setattr(driver, "cuLaunchKernel", launch)
    monkeypatch.setattr(driver, "cuCtxGetCurrent", lambda: (good, noted["context"]))
    monkeypatch.setattr(driver, "cuCtxSetCurrent", choose)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 1, raising=False)
    monkeypatch.setattr(
        torch._C, "_cuda_getCurrentRawStream", lambda index: 70 + index, raising=False
    )
    monkeypatch.setattr(_cuda._entered, "devices", set())
    return noted


def test_a_launch_hands_over_its_struct_on_the_current_stream(driver):
    kernel = _cuda.Kernel("two", 1, 5, 9)
    for _ in range(2):
        kernel.launch((3, 2, 1), 64, Two(7, 8), 1024)
        assert driver["launch"] == (5, 3, 2, 1, 64, 1, 1, 1024, 71, 7, 8)
    assert driver["set"] == [9]  # the thread had no context, and then it had one


def test_a_launch_that_overlaps_says_so(driver, monkeypatch):
    from cuda.bindings import driver as bindings

    def launch(config, function, parameters, extra):
        (attribute,) = config.attrs
        address = ctypes.c_void_p.from_address(parameters).value
        driver["launch"] = (
            *(config.gridDimX, config.gridDimY, config.gridDimZ, config.blockDimX),
            *(config.sharedMemBytes, int(config.hStream), function, int(attribute.id)),
            attribute.value.programmaticStreamSerializationAllowed,
            Two.from_address(address).second,
        )
        return (driver["status"],)

    monkeypatch.setattr(bindings, "cuLaunchKernelEx", launch)
    _cuda.Kernel("two", 1, 5, 9).launch((3, 2, 1), 64, Two(7, 8), 1024, overlaps=True)
    serialisation = (
        bindings.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    )
    assert driver["launch"] == (3, 2, 1, 64, 1024, 71, 5, int(serialisation), 1, 8)


def test_a_context_that_is_there_is_left_alone(driver):
    driver["context"] = 9
    _cuda.Kernel("two", 1, 5, 9).launch((1, 1, 1), 32, Two())
    assert driver["set"] == []


def test_a_launch_that_the_driver_refuses_is_told(driver):
    from cuda.bindings.driver import CUresult

    driver["status"] = CUresult.CUDA_ERROR_INVALID_VALUE
    with pytest.raises(
        RuntimeError,
        match=r"could not launch two on a grid of \(1, 1, 1\): CUDA_ERROR_INVALID_VALUE$",
    ):
        _cuda.Kernel("two", 1, 5, 9).launch((1, 1, 1), 32, Two())


def test_tensors_are_made_beside_the_inputs():
    """Not on the default device, which tests with ``--device`` set to that of the inputs."""
    made = {k: torch.rand(2, 5, 4, requires_grad=True) for k in ("x", "dt", "B", "C", "gate")}
    A, weight, bias = -torch.rand(4, 4), torch.rand(4, 4), torch.rand(4)
    for backend in ("auto", "reference", "parallel"):
        with torch.device("meta"):
            y, _ = causal_conv1d(made["x"], weight, bias, activation="silu", backend=backend)
            out = selective_scan(**made | {"x": y}, A=A, D=bias, dt_bias=bias, backend=backend)
            found = torch.autograd.grad(out.y.sum() + out.state.sum(), list(made.values()))
        assert {t.device for t in found} == {made["x"].device}
