"""Trainings for tests: settings, command lines, results."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import yaml

# Tests run on the CPU; those marked `gpu` pass GPU_ENVIRONMENT to their processes. K8SCIFAR_TEST_GPUS keeps the value,
# because xdist's workers start with CUDA_VISIBLE_DEVICES already empty.
GPU_ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": os.environ.setdefault("K8SCIFAR_TEST_GPUS", os.environ.get("CUDA_VISIBLE_DEVICES", "0"))
}
os.environ["CUDA_VISIBLE_DEVICES"] = ""

REPOSITORY = Path(__file__).resolve().parents[3]
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
HELPERS = Path(__file__).parent
CUT_AT = 4  # steps before the cut of a training that `train_in_turn` resumes, if its `cut_at` is not set


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


def free_ports(count: int) -> list[int]:
    """Unused TCP ports."""
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def train_in_turn(
    folder: Path,
    data: Path,
    trainings: list[dict],
    ranks: int = 2,
    config: dict = TINY,
    program: str = "comm_ranks.py",
) -> subprocess.CompletedProcess:
    """Run the trainings (keys: name, sets, the program's) one after the other in the same ranks."""
    (folder / "tiny.yaml").write_text(yaml.safe_dump(config))
    plan = []
    for port, training in zip(free_ports(len(trainings)), trainings, strict=True):
        paths = ["--config", str(folder / "tiny.yaml"), "--data-dir", str(data), "--runs-dir", str(folder)]
        sets = [part for value in training["sets"] for part in ("--set", value)]
        if cut := training.get("cut"):
            places = {"from": str(folder / cut), "to": str(folder / training["name"])}
            cut = places | {"step": training.get("cut_at", CUT_AT)}
        plan.append(training | {"port": port, "arguments": [*paths, "--name", training["name"], *sets], "cut": cut})
    (folder / "plan.json").write_text(json.dumps(plan))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return run([*command, str(HELPERS / program), str(folder / "plan.json")], timeout=280)


def cli_command(*arguments: str) -> list[str]:
    """The command line `k8scifar` with these arguments."""
    return [sys.executable, "-m", "k8scifar", *arguments]


def cli(*arguments: str, **options) -> subprocess.CompletedProcess:
    """Run `k8scifar` with these arguments."""
    return run(cli_command(*arguments), **options)


def history(folder: Path) -> list[dict]:
    """metrics.jsonl of a run folder without the times, which differ between equal runs."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        del record["images_per_second"], record["seconds"], record["checkpoint_seconds"]
        record.pop("speed", None)  # of several machines
    return records


def weights_hash(folder: Path) -> str:
    """sha256 of a finished run's weights, from its summary."""
    return json.loads((folder / "summary.json").read_text())["weights_sha256"]
