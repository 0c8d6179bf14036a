"""Recovery on two hosts: any order of start, cut-off and silent machines, strangers, and a short run of chaos."""

from __future__ import annotations

import re
import signal
import sys
import time

import chaos
import hosts
import pods
import pytest
import yaml
from runs import HELPERS, TINY, history, weights_hash

from k8scifar.exchange import modes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
CONFIG = TINY | {
    "epochs": 4,
    "distributed": {"timeout_seconds": 6.0, "comm": "allreduce"},
    "checkpoint": {"every_steps": 3},
    "log": {"every_seconds": 0.001, "tensorboard": False},
}


@pytest.fixture(scope="module")
def folder(module_path):
    (module_path / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    return module_path


@pytest.fixture(scope="module")
def machines():
    with hosts.several(pods.names(2)) as pair:
        yield pair


@pytest.fixture
def group(machines, folder, tiny_data, request):
    """Two pods, not yet started, of a run named like the test."""
    pair = pods.Group(machines, folder, folder / "config.yaml", tiny_data, request.node.name[5:30])
    yield pair
    pair.stop()
    for machine in machines:
        machine.know(machines)
        machine.link(up=True)


@pytest.fixture(scope="module")
def undisturbed(machines, folder, tiny_data):
    """The run folder of an undisturbed training."""
    pair = pods.Group(machines, folder, folder / "config.yaml", tiny_data, "undisturbed")
    try:
        for rank in (0, 1):
            pair.start(rank)
        pair.until(lambda: pair.done, 250, "the end")
    finally:
        pair.stop()
    return pair.run_dir


def assert_same(group, undisturbed) -> None:
    assert weights_hash(group.run_dir) == weights_hash(undisturbed)
    assert history(group.run_dir) == history(undisturbed)


def test_a_late_node_0_whose_name_comes_late_and_whose_port_is_taken(group, machines, undisturbed):
    machines[1].know([machines[1]])
    second = group.start(1)
    squatter = "import socket, time; taken = socket.create_server(('', 29500)); time.sleep(1000)"
    stale = machines[0].popen([sys.executable, "-c", squatter], {}, group.folder / "stale-log")
    time.sleep(3.0)
    machines[1].know(machines)
    time.sleep(4.0)
    group.start(0)
    group.until(
        lambda: "port 29500 of this machine is in use" in group.pods[1].text(), 100, "told that the port is taken"
    )
    assert group.steps == []
    stale_processes = machines[0].processes("create_server")
    hosts.send(stale_processes, signal.SIGKILL)
    stale.wait(10)
    group.until(lambda: group.done, 250, "the end")
    assert second.codes == [] and group.pods[1].codes == []
    assert_same(group, undisturbed)


def test_a_partition_is_named_on_both_sides_and_mends_itself(group, machines, undisturbed):
    for rank in (0, 1):
        group.start(rank)
    group.until(lambda: group.step >= 5, 150, "step 5")
    machines[0].link(up=False)
    named = (r"rank 0 gave up: .*rank 1 \(cifar-1\)", r"rank 1 gave up: .*rank 0")
    for pod, pattern in zip(group.pods, named, strict=True):
        group.until(lambda pod=pod, pattern=pattern: re.search(pattern, pod.text()), 100, pattern)
    machines[0].link(up=True)
    group.until(lambda: group.done, 250, "the end")
    assert [pod.codes for pod in group.pods] == [[], []], "a container ended for its peer's fault"
    assert_same(group, undisturbed)


def test_strangers_on_every_port_neither_join_nor_end_the_training(group, machines, undisturbed):
    """Nonsense, half a handshake and hundreds of idle connections, at the store's port and the ranks' own."""
    for rank in (0, 1):
        group.start(rank)
    group.until(lambda: group.step >= 2, 150, "step 2")
    listening = pods.in_space(machines[0], "ss", "-Hltn").stdout
    ports = sorted({int(found) for found in re.findall(r"[\]\*0]:(\d+)\s", listening)})
    assert pods.PORT in ports
    log = group.folder / "stranger-log"
    stranger = [sys.executable, str(HELPERS / "stranger.py"), machines[0].address, *map(str, ports)]
    machines[1].popen(stranger, {"HOME": "/"}, log)
    group.until(lambda: "kept" in log.read_text(), 60, "the attack")
    assert int(re.search(r"kept (\d+)", log.read_text())[1]) > 100
    group.until(lambda: group.done, 250, "the end")
    assert [pod.codes for pod in group.pods] == [[], []]
    assert "gave up" not in group.pods[0].text() + group.pods[1].text()
    assert_same(group, undisturbed)


@pytest.mark.nightly
@pytest.mark.parametrize("comm", modes.KINDS)
def test_a_short_run_of_chaos(tmp_path, comm):
    seed = int(time.time())
    print(f"seed {seed}")
    report = chaos.Report()
    chaos.chaos(tmp_path, list(chaos.KILLS), 4, seed, report, comm)
    assert [strike.recovered for strike in report.strikes] == [True] * 4
    assert report.wrong == 0, report.table()
