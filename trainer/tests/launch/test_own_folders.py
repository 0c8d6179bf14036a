"""Two hosts that share no folder: the data set travels, each keeps the checkpoints, and either may lose all it has."""

from __future__ import annotations

import re
import shutil

import pods
import pytest
import yaml
from runs import HELPERS, TINY, history, run, train_command, weights_hash

from k8scifar.results import status

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
CONFIG = TINY | {
    "epochs": 4,
    "distributed": {"timeout_seconds": 8.0, "comm": "allreduce"},
    "checkpoint": {"every_steps": 2},
    "log": {"every_seconds": 0.001, "tensorboard": False},
}


@pytest.fixture(scope="module")
def config(module_path):
    path = module_path / "config.yaml"
    path.write_text(yaml.safe_dump(CONFIG))
    return path


@pytest.fixture(scope="module")
def undisturbed(config, tiny_data):
    """The run folder of an undisturbed training on one machine."""
    done = run(train_command(2, config, tiny_data, config.parent / "runs", "undisturbed"))
    assert done.returncode == 0, done.stderr
    return config.parent / "runs" / "undisturbed"


@pytest.fixture
def group(config, tiny_data, tmp_path):
    """Two pods, not yet started; the first one's machine has the data set."""
    shutil.copytree(tiny_data, tmp_path / "data-0")
    with pods.group(tmp_path, config, tiny_data, "run", "--storage=local") as pair:
        yield pair


@pytest.fixture
def by_hand(config, tiny_data, tmp_path):
    """Two people at two machines, who type the command again whenever it has ended."""
    shutil.copytree(tiny_data, tmp_path / "data-0")
    with pods.group(tmp_path, config, tiny_data, "run", "--storage=local", "--when-done=exit") as pair:
        yield pair


def begin(group, rank: int, **variables: str) -> pods.Pod:
    return group.start(rank, group.folder / f"data-{rank}", group.folder / f"runs-{rank}", **variables)


def left(group, rank: int):
    """The run folder of this node."""
    return group.folder / f"runs-{rank}" / "run"


def checkpoints(group, rank: int) -> list[str]:
    return sorted(path.name for path in (left(group, rank) / "checkpoints").glob("*.pt"))


def crash(group) -> None:
    """Both machines lose power; the containers come again a second later."""
    for machine in group.machines:
        machine.kill()


def test_either_node_may_lose_all_it_has_at_any_time(group, undisturbed, tiny_data):
    """Within the transfer, in mid-training, after the end: it goes on, ends in the same weights, and both know it."""
    faults = {"PYTHONPATH": str(HELPERS / "faults"), "K8SCIFAR_FAULTS_DIR": str(group.folder)}
    begin(group, 0)
    begin(group, 1, K8SCIFAR_FAULTS="write:train-images:kill:1", **faults)
    first, second = (pod.text for pod in group.pods)
    group.until(lambda: checkpoints(group, 1), 150, "a checkpoint on node 1")
    assert "train-images" in second() and "1.8 MB of 1.8 MB are already here; resuming" in second()
    assert {path.read_bytes() for path in (group.folder / "data-1").glob("*.npy")} == {
        path.read_bytes() for path in tiny_data.glob("*.npy")
    }

    crash(group)
    shutil.rmtree(left(group, 0))
    group.until(lambda: "comes from the node of rank 1" in first(), 90, "node 0 to take node 1's checkpoint")
    assert second().count("copying synthetic") == 2, "a node that has the data set takes nothing"
    before = len(group.steps)
    group.until(lambda: len(group.steps) > before, 90, "another step")

    crash(group)
    shutil.rmtree(left(group, 1))
    for name in checkpoints(group, 0)[:-1]:
        (left(group, 0) / "checkpoints" / name).unlink()
    group.until(lambda: "comes from the node of rank 0" in second(), 90, "node 1 to take node 0's checkpoint")
    group.until(lambda: group.done, 150, "the end")
    assert checkpoints(group, 0)[-1] == checkpoints(group, 1)[-1]
    assert "drifted" not in first() + second()

    group.machines[0].kill()
    shutil.rmtree(left(group, 0))
    told = first().count("holding until")
    group.until(lambda: first().count("holding until") > told, 90, "the end, told by node 1")
    for rank in (0, 1):
        assert weights_hash(left(group, rank)) == weights_hash(undisturbed)
        assert history(left(group, rank)) == history(undisturbed)
        assert (left(group, rank) / "model.safetensors").exists()
        assert checkpoints(group, rank)[-1].startswith("step-00000024-")
        told = status.describe(left(group, rank), status.look(left(group, rank)), 0.0)
        assert told.startswith("run: done") and f"this is what node {rank} knows" in told
    assert "Traceback" not in first() + second()
    assert [pod.codes for pod in group.pods] == [[-9, -9, -9], [-9, -9]]


@pytest.mark.nightly
def test_a_full_disk_on_one_machine_is_told_there_and_the_other_keeps_the_run(by_hand, small_disk, undisturbed):
    group, small = by_hand, small_disk("30m")
    begin(group, 0)
    group.start(1, group.folder / "data-1", small)
    first, second = group.pods
    group.until(lambda: first.codes and second.codes, 150, "the end")
    assert (first.codes[0], second.codes[0]) == (0, 0)
    assert "checkpoint of step 4 could not be written (No space left on device)" in second.text()
    assert re.search(r"model.safetensors could not be written .*; another node has it all", second.text())
    assert "could not" not in first.text()
    assert weights_hash(left(group, 0)) == weights_hash(undisturbed)
    group.until(lambda: len(first.codes) > 1, 60, "the end, told again")
    assert first.codes[1] == 0 and first.text().count("k8scifar: training is done") == 2
    assert "attempt" not in first.text()
