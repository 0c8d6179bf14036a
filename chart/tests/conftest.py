"""What the tests of the chart and its tools share, beside trainer/tests/helpers/suite.py."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import suite


def pytest_configure(config: pytest.Config) -> None:
    """The shared part, once, whichever folders are tested."""
    if not config.pluginmanager.has_plugin("suite"):
        config.pluginmanager.register(suite, "suite")


@pytest.fixture
def api(tmp_path: Path):
    """A server for a real kubectl."""
    from kube_api import serving

    with serving(tmp_path) as cluster:
        yield cluster


@pytest.fixture
def run_folder(stage) -> Path:
    """The run folder in the volume."""
    folder = stage.home / "volumes" / "checkpoints" / "runs" / "cifar"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / "step-1.pt").write_bytes(b"c" * 5000)
    (folder / "model.safetensors").write_bytes(os.urandom(50_000))
    (folder / "summary.json").write_text(json.dumps({"accuracy": 0.9, "epochs": 3}))
    (folder / "report.html").write_text("<!doctype html>")
    return folder
