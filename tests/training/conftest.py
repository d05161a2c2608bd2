"""A run that takes a second: a source file of the standard library and a tiny model."""

import textwrap
from pathlib import Path

import pytest

from mambakit.training import parse_config


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(Path(textwrap.__file__).read_bytes()[:12_000])
    return path


@pytest.fixture
def tables(text):
    """The tables of such a run; tests change what they are about."""
    return {
        "data": {"files": [str(text)], "validation": 0.1, "test": 0.1},
        "model": {"d_model": 16, "n_layer": 2, "d_state": 4},
        "training": {
            "steps": 12,
            "batch_size": 2,
            "length": 32,
            "evaluate_every": 5,
            "evaluate_tokens": 256,
            "log_every": 2,
            "precision": "fp32",
            "device": "cpu",
        },
        "report": {"tokens": 20},
    }


@pytest.fixture
def config(tables):
    return parse_config(tables)
