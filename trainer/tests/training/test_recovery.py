"""Recovery on one machine: killed, frozen and slow ranks, a failing volume, another number of ranks."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from runs import HELPERS, TINY, cli_command, history, weights_hash

from k8scifar.training import checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
FAULTS = HELPERS / "faults"
SAVE_OFTEN = ("--set", "checkpoint.every_steps=2", "--set", "checkpoint.keep=3")


@pytest.fixture(scope="module")
def places(module_path, tiny_data):
    """Folder with a configuration that saves often, and the undisturbed run in `runs/undisturbed`."""
    (module_path / "tiny.yaml").write_text(
        yaml.safe_dump(TINY | {"micro_batch": 25, "log": {"every_seconds": 0.001, "tensorboard": False}})
    )
    done = launch(module_path, tiny_data, "undisturbed")
    assert done.returncode == 0, done.stderr
    return module_path


def launch(folder: Path, data: Path, name: str, *arguments: str, ranks: int = 2, **environment: str):
    """Run `k8scifar launch` as a pod does, with faults; return the finished process."""
    paths = ("--config", str(folder / "tiny.yaml"), "--data-dir", str(data), "--runs-dir", str(folder / "runs"))
    command = cli_command("launch", "--nproc-per-node", str(ranks), "--restart=always", *paths, "--name", name)
    marks = folder / f"{name}-faults"
    marks.mkdir(exist_ok=True)
    own = {"PYTHONPATH": str(FAULTS), "K8SCIFAR_FAULTS_DIR": str(marks)}
    return subprocess.run(
        [*command, *SAVE_OFTEN, *arguments],
        env=os.environ | own | environment,
        capture_output=True,
        text=True,
        timeout=600,
    )


def struck(folder: Path, name: str) -> int:
    """Number of faults that have struck in this run."""
    return len(list((folder / f"{name}-faults").iterdir()))


def assert_undisturbed(folder: Path, name: str) -> None:
    """Assert that weights and metrics equal the undisturbed run's, bit for bit."""
    assert weights_hash(folder / "runs" / name) == weights_hash(folder / "runs" / "undisturbed")
    assert history(folder / "runs" / name) == history(folder / "runs" / "undisturbed")


def test_killed_at_every_point_of_a_training_it_ends_with_the_same_weights(places, tiny_data):
    points = [
        "call:k8scifar.training.resume.find:kill:0",  # the ranks have met
        "call:k8scifar.training.optim.set_lr:kill:1",  # the first step
        "write:step-00000002:kill:0",  # a checkpoint is written, not yet renamed
        "call:k8scifar.training.norms.momentum:kill-soon:1",  # in a step's collective, or near it
        "rename:step-00000004:kill:0",  # a checkpoint is safe, the old ones not yet pruned
        "call:k8scifar.training.evaluation.evaluate:kill:1",  # an evaluation
        "call:k8scifar.training.loop._keep_going:term:1",  # one rank gets SIGTERM in an evaluation: all save
        "write:metrics.jsonl:kill:0",
        "write:model.safetensors:kill:0",
        "write:summary.json:kill:0",
        "rename:summary.json:kill:0",  # done, but no other rank has seen it
    ]
    done = launch(places, tiny_data, "killed", K8SCIFAR_FAULTS=" ".join(points))
    assert done.returncode == 0, done.stderr
    assert struck(places, "killed") == len(points)
    assert_undisturbed(places, "killed")
    folder = places / "runs" / "killed"
    assert not [*folder.glob(".*.tmp"), *folder.glob("checkpoints/.*.tmp")], "incomplete files are left"
    assert "stopped by SIGTERM at step 6; saved" in done.stderr
    assert "communication: allreduce; kept from the checkpoint, not measured again" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_frozen_rank_and_a_slow_one_are_identified_and_the_group_recovers(places, tiny_data):
    points = ["call:k8scifar.training.optim.set_lr:freeze:1", "write:metrics.jsonl:stall=12:0"]
    done = launch(
        places, tiny_data, "frozen", "--set", "distributed.timeout_seconds=5", K8SCIFAR_FAULTS=" ".join(points)
    )
    assert done.returncode == 0, done.stderr
    assert struck(places, "frozen") == len(points)
    assert re.search(r"rank 0 gave up: no sign of life from rank 1 \(\S+\): frozen, or cut off", done.stderr)
    assert re.search(r"rank 1 gave up: rank 0 \(\S+\) is alive but did not get as far in time", done.stderr)
    assert_undisturbed(places, "frozen")


def test_a_volume_that_fails_for_a_moment_is_tried_again(places, tiny_data):
    points = [
        "write:config.yaml:ESTALE",
        "write:step-00000002:ESTALE",
        "write:step-00000004:EIO",
        "write:step-00000006:stall=10",  # slower than the next checkpoint comes
        "write:metrics.jsonl:ESTALE",
        "write:model.safetensors:stall=10",  # longer than a collective's time-out
        "write:summary.json:ESTALE",
    ]
    done = launch(
        places, tiny_data, "shaky", "--set", "distributed.timeout_seconds=8", K8SCIFAR_FAULTS=" ".join(points)
    )
    assert done.returncode == 0, done.stderr
    assert struck(places, "shaky") == len(points)
    assert "could not be written" not in done.stderr
    assert "gave up" not in done.stderr
    assert "left out: the volume is still busy" in done.stderr
    assert_undisturbed(places, "shaky")


def test_a_checkpoint_of_two_ranks_resumes_on_one_and_on_four(places, tiny_data):
    """The same micro-batches in the same order; losses agree to 1e-3, because sums round in another order."""
    reference = history(places / "runs" / "undisturbed")
    fault = "rename:step-00000004:kill:0"
    done = launch(places, tiny_data, "ranks-1", "--restart=never", K8SCIFAR_FAULTS=fault)
    assert done.returncode == 4  # by a signal
    shutil.copytree(places / "runs" / "ranks-1", places / "runs" / "ranks-4")
    for ranks in (1, 4):
        name = f"ranks-{ranks}"
        done = launch(places, tiny_data, name, ranks=ranks)
        assert done.returncode == 0, done.stderr
        assert f"world size {ranks}" in done.stderr and "resuming at step 4" in done.stderr
        found = history(places / "runs" / name)
        assert [record["step"] for record in found] == [record["step"] for record in reference]
        for record, other in zip(found, reference, strict=True):
            assert record["train_loss"] == pytest.approx(other["train_loss"], rel=1e-3)
            assert record["lr"] == other["lr"]
        saved = checkpoint.load(checkpoint.listed(places / "runs" / name / "checkpoints")[0])
        assert saved["world_size"] == ranks
