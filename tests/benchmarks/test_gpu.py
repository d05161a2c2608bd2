"""What the GPU's benchmarks check before they time, and how their rows are shown."""

import pytest
import torch

from benchmarks import gpu, gpu_scan, gpu_training_step, tables
from benchmarks.rows import Row, merge, write
from mambakit.ops import _backends

MACHINE = {
    "device": "a GPU", "multiprocessors": 1, "torch": "2", "cuda": "13", "transformers": "5",
    "commit": "c", "date": "d",
}  # fmt: skip

needs_kernels = pytest.mark.skipif(
    _backends.why_not_fused("all", torch.device("cpu")) is not None,
    reason="the fused kernels are what is checked",
)


@pytest.fixture(autouse=True)
def _without_a_gpu(monkeypatch):
    monkeypatch.setattr(gpu, "DEVICE", "cpu")


def row(benchmark, case, subject, *samples, unit="ms", **more):
    return Row(benchmark, case, subject, unit, list(samples), machine=MACHINE, **more)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("elements", [2**9, 2**26])
def test_the_scan_is_checked_by_slices(monkeypatch, dtype, elements):
    monkeypatch.setattr(gpu_scan, "_CHECKED_ELEMENTS", elements)
    check = gpu_scan._check(gpu_scan.inputs(2, 12, 33, 4, dtype))
    assert 0 < check.value <= 1
    assert ("dB" in check.what) is (elements > 2**9)


@needs_kernels
@pytest.mark.parametrize("wrong", ["x", "B", "gate", "dt_bias"])
def test_a_scan_that_errs_is_not_timed(monkeypatch, wrong):
    right = gpu_scan._ours

    def err(i, backend):
        return right(i | ({wrong: 1.1 * i[wrong]} if backend == "fused" else {}), backend)

    monkeypatch.setattr(gpu_scan, "_ours", err)
    with pytest.raises(RuntimeError, match="error against float64"):
        gpu_scan._check(gpu_scan.inputs(2, 12, 33, 4, torch.float32))


@needs_kernels
def test_a_model_that_errs_is_not_timed(monkeypatch):
    monkeypatch.setattr(gpu_training_step, "_CHECKED", 8)
    case = gpu_training_step.Case("tiny", 16, 2, 2, 32, 2, 16)
    step = gpu_training_step._Ours(case, gpu_training_step._draw(case))
    assert 0 < step.check().value <= 2
    step()
    step.learner.model.backbone.norm_f.register_forward_hook(
        lambda module, inputs, y: 1.1 * y if y.shape[1] > 8 else y
    )
    with pytest.raises(RuntimeError, match="logits over eager bf16's must be at most 2"):
        step.check()


def test_a_case_measured_again_replaces_its_rows(tmp_path):
    file = tmp_path / "rows.jsonl"
    old = [
        row("b", "one", "fused", 1.0),
        row("b", "one", "gone", 1.0),
        row("b", "two", "fused", 2.0),
    ]
    assert merge(file, old) == old
    write(old, file)
    new = [row("b", "three", "fused", 3.0), row("b", "one", "fused", 4.0)]
    assert merge(file, new) == [new[1], old[2], new[0]]


def test_gpu_rows_become_tables(tmp_path):
    scan = "forward, (b, d, l, n) = (8, 2048, 2048, 16), bf16"
    step = "370M, 16 x 2,048 tokens"
    folder = tmp_path / "a-gpu"
    write(
        [row("s", scan, "fused", 2.0), row("s", scan, "floor", 1.0)], folder / "gpu_scan.jsonl"
    )
    memory = {"unit": "GB"}
    write(
        [
            row("t", step, "mambakit", 2.0, unit="s", tokens=100),
            row("t", step, "Llama, compiled", 4.0, unit="s", tokens=100),
            row("t", f"{step}, peak", "mambakit", 30.0, **memory),
            row("t", f"{step}, peak", "Llama, compiled", 60.0, **memory),
        ],
        folder / "gpu_training_step.jsonl",
    )
    blocks = tables.render(tmp_path)
    assert f"| {scan} | 2 ms | 2x | - | - |" in blocks["gpu_scan"]
    assert f"| {step} | 50 tokens/s | 25 tokens/s | 2x | - | - |" in blocks["gpu_training_step"]
    assert f"| {step}, peak | 30 GB | 60 GB | 0.5x | - | - |" in blocks["gpu_training_step"]
    assert "a GPU; torch 2, CUDA 13" in blocks["summary"]
    assert "compiled Llama 25 tokens/s: 2x" in blocks["summary"]


def test_the_kernels_page_has_tables_of_what_was_measured_and_of_nothing_else(tmp_path):
    shape = "(b, d, l, n) = (8, 2048, 2048, 16), bf16"
    other = "(b, d, l, n) = (3, 5, 7, 16), bf16"
    both = f"forward + backward, {shape}"
    file = tmp_path / "a-gpu" / "gpu_scan.jsonl"
    write(
        [
            row("s", both, "fused", 3.0),
            row("s", both, "floor", 2.0, note="bound by memory"),
            row("s", f"peak memory, {shape}", "fused", 1234.5, unit="MB"),
            row("s", f"forward, {other}", "fused", 1.0),
        ],
        file,
    )
    blocks = tables.render(tmp_path)
    assert (
        f"| {both} | 3 ms | 2 ms, bound by memory | 1.5x | 1,234 MB |"
        in (blocks["kernels_backward"])
    )
    assert not {"kernels_forward", "kernels_conv", "kernels_token"} & blocks.keys()
    assert f"| forward, {other} | 1 ms |" in blocks["gpu_scan"]
    write([row("s", both, "fused", 3.0)], file)
    assert f"| {both} | 3 ms | - | - | - |" in tables.render(tmp_path)["kernels_backward"]


def test_cases_have_names_of_their_own():
    names = [str(case) for case in gpu_training_step.CASES]
    assert len(set(names)) == len(names)
