"""Laws of ``mambakit doctor``: it names what is missing, and notices what is wrong."""

import pytest

from mambakit import doctor
from mambakit.modules import _hardware
from mambakit.ops import _backends, _native


@pytest.fixture
def run():
    def run_doctor():
        lines = []
        return doctor.report(lines.append), lines

    return run_doctor


def test_everything_that_is_usable_computes_the_right_numbers(run):
    healthy, lines = run()
    assert healthy
    assert lines[-1] == "everything works"
    for operation in ("selective_scan", "causal_conv1d"):
        assert any(line.startswith(f"  {operation} parallel on cpu") for line in lines)


@pytest.mark.skipif(_native.unavailable() is not None, reason=str(_native.unavailable()))
def test_the_kernels_are_checked_and_named_with_their_instruction_set(run):
    _, lines = run()
    assert f"  {'cpu':<15} fused ({_native.isa()})" in lines
    assert sum(" fused on cpu" in line for line in lines) == 4


def test_a_gpu_is_named_with_its_capability_and_the_compiler(monkeypatch):
    gpu = doctor.torch.device("cuda", 0)
    monkeypatch.setattr(doctor, "_present", lambda: iter([gpu]))
    monkeypatch.setattr(doctor.torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    monkeypatch.setattr(doctor.torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(doctor._cuda, "version", lambda: (13, 0))
    assert list(doctor.devices()) == [("cuda:0", "NVIDIA H200, compute capability 9.0")]
    monkeypatch.setattr(_backends._cuda, "unavailable", lambda index: None)
    assert next(doctor.kernels()) == ("cuda:0", "fused (compiled by NVRTC 13.0)")
    monkeypatch.setattr(_backends._cuda, "unavailable", lambda index: "install a compiler")
    monkeypatch.setattr(_backends, "_ask_about_triton", lambda kind, index: None)
    assert list(doctor.kernels())[:2] == [
        (
            "cuda:0",
            "selective_scan fused (Triton, slower than the CUDA kernels: install a compiler)",
        ),
        ("", "causal_conv1d parallel; fused is not usable: install a compiler"),
    ]


def test_a_missing_kernel_is_named_with_the_reason_and_is_no_failure(run, monkeypatch):
    monkeypatch.setitem(_backends.MISSING, "cpu", "nobody built it")
    healthy, lines = run()
    assert healthy
    assert any(line.endswith("fused is not usable: nobody built it") for line in lines)
    assert not any(" fused on cpu" in line for line in lines)


@pytest.mark.parametrize("left_over", [True, False])
def test_a_build_that_failed_is_told_also_where_another_serves(
    run, monkeypatch, tmp_path, left_over
):
    monkeypatch.setattr(_native, "_MISSING", tmp_path / "_cpu_missing.txt")
    if left_over:
        (tmp_path / "_cpu_missing.txt").write_text("_cpu_avx512 failed to compile (why)\n")
    healthy, lines = run()
    assert healthy
    told = [line for line in lines if line.startswith("  not built")]
    assert told == ["  not built       _cpu_avx512 failed to compile (why)"] * left_over


def test_builds_without_the_one_to_start_from_are_no_lie_about_the_processor(
    monkeypatch, tmp_path
):
    monkeypatch.setattr(_native, "_FOLDER", tmp_path)
    monkeypatch.setattr(_native, "_MISSING", tmp_path / "_cpu_missing.txt")
    (tmp_path / "_cpu_avx512.so").touch()
    why = _native._why_none()
    assert "_cpu_avx512.so" in why
    assert "reinstall mambakit" in why


@pytest.mark.parametrize("wrong", [1.001, float("nan")])
def test_a_wrong_number_is_noticed(run, monkeypatch, wrong):
    honest = doctor.selective_scan

    def spoilt(*args, backend, **kwargs):
        y, state = honest(*args, backend=backend, **kwargs)
        return (y if backend == "reference" else y * wrong), state

    monkeypatch.setattr(doctor, "selective_scan", spoilt)
    healthy, lines = run()
    assert not healthy
    assert any(line.startswith("  selective_scan") and "WRONG" in line for line in lines)
    assert not any(line.startswith("  causal_conv1d") and "WRONG" in line for line in lines)
    assert lines[-1].endswith("of the checks failed")


def test_extras_that_are_not_installed_are_named_with_the_command(monkeypatch):
    real = doctor.metadata.version

    def version(name):
        if name in ("matplotlib", "huggingface_hub", "triton"):
            raise doctor.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(doctor.metadata, "version", version)
    told = dict(doctor.versions())
    assert "pip install 'mambakit[plot]'" in told["matplotlib"]
    assert "pip install 'mambakit[hub]'" in told["huggingface_hub"]
    assert "triton" not in told  # no extra of ours brings it


def test_the_compiler_is_told_by_its_version_or_by_what_it_lacks(monkeypatch):
    monkeypatch.setattr(doctor.metadata, "version", lambda name: f"{name} 1")
    monkeypatch.setattr(doctor._cuda, "_compiler", lambda: (13, 5))
    told = dict(doctor.versions())
    assert told["nvrtc"] == "13.5"
    assert told["triton"] == "triton 1"
    monkeypatch.setattr(doctor._cuda, "_compiler", lambda: "it is nowhere")
    assert dict(doctor.versions())["nvrtc"] == "not usable: it is nowhere"


@pytest.mark.parametrize(
    ("able", "told"),
    [
        ({"avx512_bf16": True, "amx_bf16": True, "amx_fp16": True}, "avx512_bf16 and amx_bf16"),
        (
            {"avx512_bf16": False},
            "no instructions: products of 16 rows or more are made in float32",
        ),
    ],
)
def test_the_processors_bf16_instructions_are_named(monkeypatch, able, told):
    monkeypatch.setattr(_hardware, "_cpu_capabilities", lambda: able)
    assert dict(doctor.processor())["bf16"] == told
