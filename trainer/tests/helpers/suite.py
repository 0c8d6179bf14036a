"""What all tests share, wherever they lie: limits of time, an owner for what they start, small data sets."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import janitor
import patience
import pytest
import yaml
from runs import TINY, run, train_command

from k8scifar.data.prepare import prepare

DISK = 8e9  # bytes that the whole suite needs for temporary files, two files of tests at a time


def pytest_configure(config: pytest.Config) -> None:
    """What a test starts ends with its runner; limits of time are for this machine, measured by the first process."""
    if all(map(os.path.isdir, config.args)) and not hasattr(config, "workerinput"):  # not some files alone
        require_room()
    janitor.start()
    patience.install()
    patience.begin()


def require_room() -> None:
    """End at once where the temporary folder is too full for the whole suite."""
    folder = tempfile.gettempdir()
    free = shutil.disk_usage(folder).free
    if free < DISK:
        need = f"the tests need {DISK / 1e9:.0f} GB for temporary files, and {folder} has {free / 1e9:.1f} GB left"
        pytest.exit(f"{need}: make room there, or name another folder: TMPDIR=FOLDER make test", returncode=2)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node) -> None:
    """A worker of xdist takes the measure of who starts it."""
    node.workerinput["patience"] = str(patience.factor())


def pytest_sessionstart(session: pytest.Session) -> None:
    if told := getattr(session.config, "workerinput", {}).get("patience"):
        os.environ[patience.VARIABLE] = told


def pytest_report_header() -> str:
    return f"limits of time: x {patience.factor():.2f} ({patience.VARIABLE})"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Slow files first, so that several workers end at about the same time; each with a limit for this machine."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
    usual = config.getoption("timeout", None)
    for item in items:
        marker = item.get_closest_marker("timeout")
        seconds = marker.args[0] if marker and marker.args else usual
        if seconds and patience.factor() > 1:
            item.add_marker(pytest.mark.timeout(patience.patient(seconds)), append=False)


@pytest.fixture(scope="session", autouse=True)
def owned(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What is mounted in the tests' folders is unmounted, whatever becomes of the runner."""
    janitor.own(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed synthetic set of 600 + 303 images: 6 steps an epoch, and a test split that divides by no rank."""
    folder = tmp_path_factory.mktemp("data")
    prepare(folder, "synthetic:600:303")
    return folder


@pytest.fixture(scope="module")
def module_path(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest):
    """A folder for all tests of a file, which goes with the last of them; it stays where one has failed."""
    failed = request.session.testsfailed
    folder = tmp_path_factory.mktemp(request.path.stem)
    yield folder
    if request.session.testsfailed == failed:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def tiny_config(tmp_path: Path) -> Path:
    """A YAML file of the settings of a training that takes seconds."""
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY))
    return path


@pytest.fixture(scope="module")
def resnet18():
    """The trainer's network with fresh weights."""
    import torch

    from k8scifar.config.sections import Model
    from k8scifar.training import model

    torch.manual_seed(0)
    return model.build(Model(), 10)


@pytest.fixture
def train(tiny_config: Path, tiny_data: Path, tmp_path: Path):
    """Train as a user would: ``train(ranks, "--set", ..., name=...)`` returns the finished process."""

    def start(ranks: int, *arguments: str, name: str = "run", **options) -> subprocess.CompletedProcess:
        command = train_command(ranks, tiny_config, tiny_data, tmp_path / "runs", name, *arguments)
        return run(command, **options)

    return start


@pytest.fixture
def small_disk(tmp_path: Path):
    """``small_disk("150m")`` mounts a file system of that size; returns where. One checkpoint is 90 MB."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to mount a small file system")
    mounted = tmp_path / "small"

    def mount(size: str) -> Path:
        mounted.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(mounted)]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("this machine does not let root mount a tmpfs")
        return mounted

    yield mount
    if os.path.ismount(mounted):
        subprocess.run(["umount", "--lazy", str(mounted)], check=True)


@pytest.fixture
def stage(tmp_path: Path):
    """Stand-ins for kubectl and its like."""
    from cluster_stage import Stage

    return Stage(tmp_path)


@pytest.fixture(scope="session")
def rendered() -> list[dict]:
    """The chart's objects, as values/two-node.yaml has them."""
    from chart_helpers import NFS, render

    return render(*NFS)
