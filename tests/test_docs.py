"""What the documentation shows must run: every docstring's example, and the README's Python."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest
import torch

import mambakit

# What a module needs that is not everywhere.
OPTIONAL = {
    "mambakit.ops.scan.triton": ("triton", "needs Triton, which PyTorch brings for GPUs"),
}

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(mambakit.__path__, "mambakit.")
    if not module.name.endswith("__main__") and "._cpu_" not in module.name
)


@pytest.fixture(autouse=True)
def _repeatable(tmp_path, monkeypatch):
    """Run every example in an empty folder and from the same random numbers."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name):
    if name in OPTIONAL:
        package, reason = OPTIONAL[name]
        pytest.importorskip(package, reason=reason)
    failed, _ = doctest.testmod(
        importlib.import_module(name),
        optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE,
    )
    assert failed == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_in_pages(page):
    """Blocks marked ``python`` run in order, as one script."""
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
    exec(compile("\n".join(blocks), str(page), "exec"), {"__name__": "page"})
    if page.name == "README.md":
        assert blocks


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages(page):
    """Every relative link and every anchor leads somewhere."""
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        other = (page.parent / name) if name else page
        assert other.exists(), f"{page.name} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", other.read_text(encoding="utf-8"), re.M)
            slugs = {
                re.sub(r"[^\w\- ]", "", h).strip().lower().replace(" ", "-") for h in headings
            }
            assert anchor in slugs, f"{page.name} links to {target}"
