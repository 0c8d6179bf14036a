"""Each key of the configuration is read somewhere in the code.

Not every command, device and mode reads every key; the keys' descriptions list the exceptions.
"""

from __future__ import annotations

import ast

import pytest
from runs import REPOSITORY

from k8scifar.cli import main
from k8scifar.config import sections
from k8scifar.config.loading import _all_keys
from k8scifar.config.schema import Config
from k8scifar.inference.evaluate import READ

PACKAGE = REPOSITORY / "trainer/src/k8scifar"
NAMES = {"settings": "", "config": "", "self": ""}  # variables that hold the configuration or one of its sections
WHOLE = {"augment"}  # passed as keyword arguments, so that a wrong name fails


def asked_for() -> set[tuple[str, str]]:
    """(object, key) of each attribute that the code reads."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                of = node.value
                name = of.attr if isinstance(of, ast.Attribute) else of.id if isinstance(of, ast.Name) else ""
                found.add((NAMES.get(name, name), node.attr))
    return found


def test_each_key_is_read():
    asked = asked_for()
    keys = [key.rpartition(".") for key in _all_keys(Config) if key.split(".")[0] not in WHOLE]
    unread = [".".join((section, name)) for section, _, name in keys if not asked & {(section, name), ("", name)}]
    assert not unread
    assert {("stage", name) for name in sections.Stage.model_fields} <= asked


@pytest.mark.parametrize("sets", ["optimizer.lr=1", "evaluation={tta: false, every_epochs: 2}", "data.dir=x", "seed=1"])
def test_evaluate_refuses_a_key_that_it_does_not_read(sets, tmp_path, capsys):
    assert main(["evaluate", str(tmp_path), "--set", sets]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "`k8scifar evaluate` does not read" in line
    assert set(READ) <= set(_all_keys(Config))


def test_the_schema_takes_no_other_options(capsys):
    assert main(["config", "--schema", "--set", "epochs=1"]) == 2
    assert "leave the other options out" in capsys.readouterr().err
