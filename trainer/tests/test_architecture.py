"""The package's parts and who may import whom: README's table, and the code held to it."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from runs import REPOSITORY

PACKAGE = REPOSITORY / "trainer/src/k8scifar"

# Data flows down this table: each part, what it holds, and the parts that it may import beside itself.
TABLE = """
| part of `k8scifar` | holds | may import |
|---|---|---|
| `cli` `errors` `files` and the other single modules | what everything may use | each other |
| `config/` | every setting of a training, typed and documented, and where its values come from | the single modules; no torch |
| `data/` | the data set: sources -> packed files -> the order of samples -> augmented batches | the single modules |
| `ranks/` | the ranks: how they join, agree, send files, and find a silent one | the single modules, `config` |
| `exchange/` | how ranks combine gradients or weights, and divide a step's work | the single modules, `config`, `ranks` |
| `results/` | what a run leaves behind and shows: its folder, TensorBoard, progress, summary, report | the single modules, `config`, `data` |
| `training/` | the training itself: the loop, and what it is made of; read `loop.py` first | the single modules, `config`, `data`, `ranks`, `exchange`, `results` |
| `inference/` | trained models: opened, evaluated on the test images, asked for single images | the single modules, `config`, `data`, `ranks`, `exchange`, `results`, `training` |
| `launch/` | around the training on each machine: checks, torchrun under a supervisor, how the machines meet | the single modules, `config`, `data`, `ranks`, `results`; no torch until a rank or an agent runs |
""".strip()  # noqa: E501
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in TABLE.splitlines()[3:]]
MAY = {cells[0].strip("`/"): set(re.findall(r"`(\w+)`", cells[2])) for cells in ROWS}


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


def test_every_folder_is_in_the_table():
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert folders == set(MAY)


@pytest.mark.parametrize("part", MAY)
def test_a_part_imports_only_what_the_table_says(part):
    files = sorted((PACKAGE / part).rglob("*.py"))
    assert files
    wrong = {path.name: odd for path in files if (odd := imported(path) - MAY[part] - {part, ""})}
    # What starts a rank names the command line, which imports a command's module when it is asked for.
    assert not wrong


def test_a_single_module_imports_no_part():
    wrong = {path.name: odd for path in sorted(PACKAGE.glob("*.py")) if (odd := imported(path) - {""})}
    assert not wrong


@pytest.mark.parametrize("part", [part for part, cells in zip(MAY, ROWS, strict=True) if "no torch" in cells[2]])
def test_a_part_without_torch_imports_none(part):
    modules = [f"k8scifar.{part}.{path.stem}" for path in (PACKAGE / part).glob("*.py") if path.stem != "__init__"]
    code = f"import importlib, sys\nfor name in {modules!r}:\n    importlib.import_module(name)\n"
    done = subprocess.run(
        [sys.executable, "-c", code + "sys.exit('torch' in sys.modules)"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("part", "sentence"), [(name, cells[1]) for name, cells in zip(MAY, ROWS, strict=True)])
def test_a_part_says_what_the_table_says(part, sentence):
    said = ast.get_docstring(ast.parse((PACKAGE / part / "__init__.py").read_text()))
    assert said.lower().startswith(sentence.replace("`", "").lower())


def test_readme_holds_the_table_word_for_word():
    assert TABLE in (REPOSITORY / "README.md").read_text()
