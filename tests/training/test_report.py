"""Laws of the closing report: its figures are those of complete codes for the test text."""

import lzma
import re

import pytest

from mambakit.evaluation import evaluate_files
from mambakit.training import closing_report, load_run, parse_config, train
from mambakit.training.corpus import find_splits


def report_of(tables, folder):
    train(parse_config(tables), folder, say=lambda line: None)
    said = []
    closing_report(folder, say=said.append)
    return "\n".join(said)


def test_it_scores_the_test_text_beside_xz(tables, tmp_path):
    said = report_of(tables, tmp_path / "run")
    run = load_run(tmp_path / "run")
    data = b"".join(document.read() for document in find_splits(run.config.data).test)
    (tmp_path / "test.txt").write_bytes(data)
    (score,) = evaluate_files(run.model, run.tokenizer, [tmp_path / "test.txt"]).values()
    assert f"test text ({len(data):,} bytes, 1 file)" in said
    figures = re.findall(r"^  (?:this model|xz -9) +(\d\.\d{3})", said, re.MULTILINE)
    ours, xz = map(float, figures)
    assert ours == pytest.approx(score.bits_per_byte, abs=6e-4)
    assert xz == pytest.approx(8 * len(lzma.compress(data, preset=9)) / len(data), abs=6e-4)


def test_it_shows_a_sample_and_the_folder(tables, tmp_path):
    tables["report"] = {"prompt": "import ", "tokens": 5}
    tables["tokenizer"] = {"kind": "character"}
    said = report_of(tables, tmp_path / "run")
    assert "a sample, after 'import '" in said
    assert len(re.search(r"^import (.*?)\n\neverything", said, re.M | re.S)[1]) == 5
    assert f"everything is in {tmp_path}/run" in said
    assert f"mambakit generate {tmp_path}/run --prompt 'import ' --stream" in said


def test_without_a_test_text_it_scores_the_validation_text(tables, tmp_path):
    tables["data"]["test"] = 0.0
    tables["report"]["tokens"] = 0
    said = report_of(tables, tmp_path / "run")
    assert "bits per byte on the whole validation text" in said
    assert "a sample" not in said


def test_separators_are_scored_and_squeezed_with_the_text(tables, tmp_path):
    tables["data"]["separator"] = "<|end|>"
    tables["report"]["tokens"] = 0
    said = report_of(tables, tmp_path / "run")
    run = load_run(tmp_path / "run")
    (document,) = find_splits(run.config.data).test
    data = document.read() + b"<|end|>"
    (tmp_path / "test.txt").write_bytes(data)
    (score,) = evaluate_files(run.model, run.tokenizer, [tmp_path / "test.txt"]).values()
    figures = re.findall(r"^  (?:this model|xz -9) +(\d+\.\d{3})", said, re.MULTILINE)
    assert f"({len(data):,} bytes, 1 file)" in said
    assert float(figures[0]) == pytest.approx(score.bits_per_byte, abs=6e-4)
    squeezed = 8 * len(lzma.compress(data, preset=9)) / len(data)
    assert float(figures[1]) == pytest.approx(squeezed, abs=6e-4)


def test_a_test_text_of_one_token_costs_a_uniform_guess(tables, text, tmp_path):
    tables["data"] |= {"validation": 0.1, "test": 0.5 / text.stat().st_size}
    tables["report"]["tokens"] = 0
    said = report_of(tables, tmp_path / "run")
    assert "test text (1 bytes, 1 file)" in said
    assert re.search(r"^  this model  8\.000 ", said, re.MULTILINE)
