"""An elastic group on two hosts: a node leaves for good, flaps, is cut off, comes back; training goes on meanwhile."""

from __future__ import annotations

import json
import re
import signal

import chaos
import hosts
import pods
import pytest
import torch
import yaml
from patience import patient
from runs import TINY, cli_command, history, run

from k8scifar.training import checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
CONFIG = TINY | {
    "epochs": 4,
    "micro_batch": 25,
    "optimizer": {"name": "sgd", "lr": 0.001},
    "distributed": {"timeout_seconds": 6.0, "comm": "allreduce"},
    "checkpoint": {"every_steps": 3},
    "log": {"every_seconds": 0.001, "tensorboard": False},
}
WAIT, GROW = 12, 4  # seconds


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("elastic")
    (path / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    return path


@pytest.fixture(scope="module")
def undisturbed(folder, tiny_data):
    """The run folder of an undisturbed training by two ranks."""
    paths = ["--config", str(folder / "config.yaml"), "--data-dir", str(tiny_data), "--runs-dir", str(folder / "runs")]
    done = run(cli_command("launch", *paths, "--name", "undisturbed"))
    assert done.returncode == 0, done.stderr
    return folder / "runs" / "undisturbed"


@pytest.fixture
def group(folder, tiny_data, request):
    """Two pods, not yet started, of a run named like the test, of which one may go on alone."""
    elastic = ("--min-nodes=1", f"--elastic-wait={patient(WAIT)}", f"--elastic-grow={GROW}")
    with pods.group(folder, folder / "config.yaml", tiny_data, request.node.name[5:25], *elastic) as pair:
        yield pair


def outside(pod) -> int:
    """How often this pod was told that the others went on without it."""
    return len(re.findall(r"its turn: training went on with node 0, which takes back .* s$", pod.text(), re.MULTILINE))


def goes_on_alone(group, times: int) -> list[int]:
    """Wait until node 0 trains alone for that many times, and freeze its rank: what comes now finds it training."""
    alone = "training goes on from the newest checkpoint with node 0"
    group.until(lambda: group.pods[0].text().count(alone) == times, 150, "node 0 alone")
    before = len(group.resumed)
    group.until(lambda: len(group.resumed) > before, 150, "a resume")
    at = group.resumed[-1][0]
    group.until(lambda: any(when > at for when, _ in group.steps[-1:]), 150, "a step alone")
    return group.machines[0].signal(signal.SIGSTOP, chaos.RANK)


def comes_back(group, frozen: list[int], times: int) -> None:
    """Wait until node 1 is taken back for that many times, then thaw rank 0, which saves."""
    group.until(lambda: group.pods[0].text().count("once the ranks have saved") == times, 150, "taken back")
    hosts.send(frozen, signal.SIGCONT)
    group.until(lambda: group.pods[0].text().count("world size 2") == times + 1, 150, "two ranks again")


def assert_equal_but_for_rounding(found, reference) -> None:
    """To the tolerance of the world-size test; each epoch is there once."""
    records, others = history(found), history(reference)
    assert [record["epoch"] for record in records] == [record["epoch"] for record in others]
    for record, other in zip(records, others, strict=True):
        assert record["train_loss"] == pytest.approx(other["train_loss"], rel=2e-4)
        assert record["test_loss"] == pytest.approx(other["test_loss"], rel=2e-3)
    saved, other = (checkpoint.load(checkpoint.listed(path / "checkpoints")[0])["model"] for path in (found, reference))
    for name, tensor in saved.items():
        if not name.endswith("num_batches_tracked"):
            torch.testing.assert_close(tensor, other[name], atol=2e-3, rtol=2e-2)


def test_a_node_that_is_gone_for_good_is_done_without_and_taken_back(group, undisturbed):
    for rank in (0, 1):
        group.start(rank)
    group.until(lambda: group.step >= 4, 150, "step 4")
    group.pods[1].stop()
    frozen = goes_on_alone(group, 1)
    ended = group.pods[0].text().count("ended (")
    for lives in range(1, 4):  # it flaps, twice
        second = group.start(1)
        group.until(lambda lives=lives, second=second: outside(second) == lives, 150, "node 1 outside")
        if lives < 3:
            second.stop()
    assert group.pods[0].text().count("ended (") == ended, "who flaps outside disturbs nobody"
    comes_back(group, frozen, 1)
    group.until(lambda: group.done, 250, "the end")
    assert_equal_but_for_rounding(group.run_dir, undisturbed)
    members = group.summary()["members"]
    assert "saved; the same command resumes" in group.pods[0].text()
    assert [(each["nodes"], each["world_size"]) for each in members] == [([0, 1], 2), ([0], 1), ([0, 1], 2)]
    assert (members[0]["from"], members[-1]["to"]) == (0, 24)
    assert history(group.run_dir)[-1]["members"][-1]["to"] == 24
    assert json.loads((group.run_dir / "members.json").read_text())["most"] == 2
    assert group.pods[0].codes == [], "the container of who stayed did not end"


def test_a_node_that_was_cut_off_with_an_older_view_trains_nothing_until_it_is_taken_back(group, undisturbed):
    for rank in (0, 1):
        group.start(rank)
    group.until(lambda: group.step >= 4, 150, "step 4")
    group.machines[0].link(up=False)
    asleep = group.machines[1].signal(signal.SIGSTOP)  # its rank and its agent keep the former attempt's view
    frozen = goes_on_alone(group, 1)
    before = {path: path.read_bytes() for path in group.run_dir.rglob("*") if path.is_file()}
    group.machines[0].link(up=True)
    hosts.send(asleep, signal.SIGCONT)
    group.until(lambda: outside(group.pods[1]), 150, "node 1 outside")
    assert {path: path.read_bytes() for path in group.run_dir.rglob("*") if path.is_file()} == before
    comes_back(group, frozen, 1)
    group.until(lambda: group.done, 250, "the end")
    assert [pod.codes for pod in group.pods] == [[], []]
    assert_equal_but_for_rounding(group.run_dir, undisturbed)
