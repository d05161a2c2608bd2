"""The CPU library compiles and links for arm64, and offers all that Python asks for.

Nothing of it is run: that takes such a machine.
"""

import ast
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMPILER = "aarch64-linux-gnu-g++"
ARM64 = 183  # in the header of a shared library, at byte 18


def flags():
    """Return the compiler's flags out of ``setup.py``, which builds when it is imported."""
    (assigned,) = (
        statement.value
        for statement in ast.parse((ROOT / "setup.py").read_text()).body
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "FLAGS"
    )
    return ast.literal_eval(assigned)


@pytest.mark.cpu
@pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"there is no {COMPILER} here")
def test_the_library_compiles_and_links(tmp_path):
    package = ROOT / "src" / "mambakit"
    sources = sorted(package.glob("**/*.cpp"))
    assert {path.parent.name for path in sources} == {"ops", "scan", "conv", "cpu_step"}
    # optimising would take minutes, and refuses nothing that compiles without
    chosen = [flag for flag in flags() if flag != "-O3"]
    chosen += [f"-I{package / 'ops'}", "-shared", "-Wl,--no-undefined"]
    library = tmp_path / "library.so"
    command = [COMPILER, *chosen, *map(str, sources), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr, done.stderr
    code = library.read_bytes()
    assert int.from_bytes(code[18:20], "little") == ARM64
    offered = {name.decode() for name in re.findall(rb"\bmk_\w+(?=\0)", code)}
    asked = {
        name
        for path in package.glob("**/*.py")
        for name in re.findall(r"\bmk_[a-z_]+", path.read_text())
    }
    assert {"mk_step", "mk_supported_level"} <= asked <= offered
