"""The package's parts and who may import whom, as trainer/README.md shows them."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from runs import REPOSITORY

PACKAGE = REPOSITORY / "trainer/src/k8scifar"

sys.path.insert(0, str(REPOSITORY / "trainer/tools"))
from source_map import PARTS, WITHOUT_TORCH, page  # noqa: E402

MAY = {part: set(imports) for part, imports in PARTS.items()}


def imported(path: Path) -> set[str]:
    """Parts of the package that a file's imports name; a single module counts as ``""``."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "k8scifar":
            names = [node.module] if node.module != "k8scifar" else [f"k8scifar.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.split(".")[0] == "k8scifar"]
        else:
            continue
        parts = [name.split(".")[1] for name in names if "." in name]
        found |= {part if part in MAY else "" for part in parts}
    return found


def test_every_folder_is_in_the_map():
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert folders == set(MAY)


@pytest.mark.parametrize("part", MAY)
def test_a_part_imports_only_what_the_map_says(part):
    files = sorted((PACKAGE / part).rglob("*.py"))
    assert files
    wrong = {path.name: odd for path in files if (odd := imported(path) - MAY[part] - {part, ""})}
    # What starts a rank names the command line, which imports a command's module when it is asked for.
    assert not wrong


def test_a_single_module_imports_no_part():
    wrong = {path.name: odd for path in sorted(PACKAGE.glob("*.py")) if (odd := imported(path) - {""})}
    assert not wrong


@pytest.mark.parametrize("part", WITHOUT_TORCH)
def test_a_part_without_torch_imports_none(part):
    modules = [f"k8scifar.{part}.{path.stem}" for path in (PACKAGE / part).glob("*.py") if path.stem != "__init__"]
    code = f"import importlib, sys\nfor name in {modules!r}:\n    importlib.import_module(name)\n"
    done = subprocess.run(
        [sys.executable, "-c", code + "sys.exit('torch' in sys.modules)"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_the_map_of_the_source_is_fresh():
    assert (REPOSITORY / "trainer/README.md").read_text() == page(), "run make source-map"
