"""Which tests of the models leave the processor: the laws, and not what is about files."""

from pathlib import Path

import pytest

LAWS = {
    "test_language.py", "test_state.py", "test_parity.py", "test_compile.py", "test_modes.py",
    "test_documents.py",
}  # fmt: skip


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.parent == Path(__file__).parent and item.path.name not in LAWS:
            item.add_marker(pytest.mark.cpu)
