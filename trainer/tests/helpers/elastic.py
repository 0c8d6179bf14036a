"""An elastic group on two hosts: how a test, or the chaos run, has node 1 leave and come back, and compares the end."""

from __future__ import annotations

import re
import signal
import time
from pathlib import Path

import hosts
import pytest
import torch
from patience import patient
from pods import Group, Pod
from runs import TINY, history

from k8scifar.training import checkpoint

# Its losses are compared to the tolerance of the world-size test, so it takes that one's small steps.
CONFIG = TINY | {
    "epochs": 4,
    "micro_batch": 25,
    "optimizer": {"name": "sgd", "lr": 0.001},
    "distributed": {"timeout_seconds": 6.0, "comm": "allreduce"},
    "checkpoint": {"every_steps": 3},
    "log": {"every_seconds": 0.001, "tensorboard": False},
}
WAIT, GROW = 8, 4  # seconds
RANK = "-u -m k8scifar.launch.worker"


def options() -> tuple[str, ...]:
    """Of `k8scifar launch`: one of the two nodes may go on alone."""
    return ("--min-nodes=1", f"--elastic-wait={patient(WAIT)}", f"--elastic-grow={GROW}")


def outside(pod: Pod) -> int:
    """How often this pod had to wait while node 0 trained without it."""
    return len(re.findall(r"waiting for node 0 to take this node back, after .* s$", pod.text(), re.MULTILINE))


def goes_on_alone(group: Group) -> list[int]:
    """Wait until node 0 trains alone, and freeze its rank: whatever comes now finds it training; returns it."""
    alone = "resuming on node 0 alone from the last checkpoint"
    group.until(lambda: alone in group.pods[0].text(), 150, "node 0 alone")
    decided = time.monotonic()
    group.until(lambda: any(at > decided for at, _ in group.resumed[-1:]), 150, "a resume")
    group.until(lambda: any(at > group.resumed[-1][0] for at, _ in group.steps[-1:]), 150, "a step alone")
    return group.machines[0].signal(signal.SIGSTOP, RANK)


def comes_back(group: Group, frozen: list[int]) -> None:
    """Wait until node 1 is to be taken back, then thaw rank 0, which saves; then until both train."""
    group.until(lambda: "once the ranks have saved" in group.pods[0].text(), 150, "taken back")
    hosts.send(frozen, signal.SIGCONT)
    group.until(lambda: group.pods[0].text().count("world size 2") == 2, 150, "two ranks again")


def assert_equal_but_for_rounding(found: Path, reference: Path) -> None:
    """Two finished runs to the tolerance of the world-size test; each epoch is there once."""
    records, others = history(found), history(reference)
    assert [record["epoch"] for record in records] == [record["epoch"] for record in others]
    for record, other in zip(records, others, strict=True):
        assert record["train_loss"] == pytest.approx(other["train_loss"], rel=2e-4)
        assert record["test_loss"] == pytest.approx(other["test_loss"], rel=2e-3)
    saved, other = (checkpoint.load(checkpoint.listed(path / "checkpoints")[0])["model"] for path in (found, reference))
    for name, tensor in saved.items():
        if not name.endswith("num_batches_tracked"):
            torch.testing.assert_close(tensor, other[name], atol=2e-3, rtol=2e-2)
