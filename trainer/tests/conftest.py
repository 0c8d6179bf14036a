"""What the tests share: small data sets, and ways to start real ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from k8scifar.data.prepare import prepare

# Tests mean the CPU, whatever the machine has; those marked `gpu` give their processes GPU_ENVIRONMENT.
GPU_ENVIRONMENT = {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0")}
os.environ["CUDA_VISIBLE_DEVICES"] = ""

REPOSITORY = Path(__file__).resolve().parents[2]
TINY = {
    "epochs": 2,
    "global_batch": 100,
    "micro_batch": 50,
    "model": {"zero_init": True, "whiten": True},
    "resolution": [{"until": 0.5, "pixels": 8}, {"until": 1.0, "pixels": 12}],
    "optimizer": {"name": "sgd", "lr": 0.02},
    "evaluation": {"batch": 64, "interim_images": 0},
    "hardware": {"device": "cpu", "precision": "fp32", "threads": 1},
    "log": {"every_seconds": 0.5, "every_steps": 3},
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow files first, so that several workers end at about the same time."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed synthetic set of 600 + 303 pictures: 6 steps an epoch, and a test split that divides by no rank."""
    folder = tmp_path_factory.mktemp("data")
    prepare(folder, "synthetic:600:303")
    return folder


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

    from k8scifar.config.schema import Model
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


def train_command(ranks: int, config: Path, data: Path, runs: Path, name: str, *arguments: str) -> list[str]:
    """The command line of a training under torchrun."""
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)),
        *("-m", "k8scifar", "train", "--config", str(config), "--data-dir", str(data), "--runs-dir", str(runs)),
        *("--name", name, *arguments),
    ]


def run(command: list[str], timeout: float = 240, **options) -> subprocess.CompletedProcess:
    """Run a command with one thread a process, its output captured as text."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | options.pop("env", {})
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment, **options)


def cli_command(*arguments: str) -> list[str]:
    """The command line `k8scifar` with these arguments."""
    return [sys.executable, "-m", "k8scifar", *arguments]


def cli(*arguments: str, **options) -> subprocess.CompletedProcess:
    """Run `k8scifar` with these arguments."""
    return run(cli_command(*arguments), **options)


def history(folder: Path) -> list[dict]:
    """metrics.jsonl of a run folder, without what differs between two equal runs: times."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        del record["images_per_second"], record["seconds"], record["checkpoint_seconds"]
    return records


def weights_hash(folder: Path) -> str:
    """sha256 of a finished run's weights, as its summary has it."""
    return json.loads((folder / "summary.json").read_text())["weights_sha256"]


# --- for the tests of the cluster tools


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
