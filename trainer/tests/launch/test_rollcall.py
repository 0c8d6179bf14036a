"""The roll call and the waiting room, at a real store."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import pytest
from patience import patient

from k8scifar.errors import PeersDiffer
from k8scifar.launch import rendezvous, sockets
from k8scifar.launch.elastic import rollcall, waiting_room
from k8scifar.launch.elastic.membership import Policy
from k8scifar.launch.node import MIN_NODES
from k8scifar.launch.reports import FOLDER, AgentReport, Writer
from k8scifar.ranks.store import connect

HERE = "127.0.0.1"
POLICY = Policy(allowed=[1, 2], expected=[0, 1], pauses=[0.5, 0.5], missed=0.0, wait=1e9, met=True)


class Ended(Exception):
    """An agent has ended."""


class Node:
    """One node's part in a thread, with its report and what it returned or raised."""

    def __init__(self, function, *arguments) -> None:
        self.report, self.outcome = Writer("agent.json", AgentReport(), {}), None
        threading.Thread(target=self._run, args=(function, *arguments), daemon=True).start()

    def _run(self, function, *arguments) -> None:
        try:
            self.outcome = function(*arguments, self.report)
        except Exception as error:
            self.outcome = error


def node_0(port: int, job: str = "job", policy: Policy = POLICY, seconds: float = 60.0) -> Node:
    return Node(lambda report: rollcall.call(HERE, port, job, policy, report, lambda: False, seconds))


def node_1(port: int, job: str = "job") -> Node:
    return Node(lambda report: waiting_room.join(HERE, port, 1, job, report, 60.0))


@pytest.fixture(autouse=True)
def agents_end_by_exception(monkeypatch):
    def end(_, reason: str) -> None:
        raise Ended(reason)

    monkeypatch.setattr(rendezvous, "end_agent", end)
    monkeypatch.setattr(rollcall, "SILENT", 1.0)


def until(condition) -> None:
    end = time.monotonic() + patient(30)
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_second_node_of_one_number_takes_part_only_once_the_first_is_silent():
    port = sockets.free_port()
    zero, one = node_0(port), node_1(port)
    until(lambda: zero.outcome and one.outcome)
    assert zero.outcome.nodes == one.outcome.nodes == [0, 1] and zero.outcome.attempt == one.outcome.attempt
    client, double = connect(HERE, port), node_1(port)
    for _ in range(40):  # twice as long as a silence
        one.outcome.each_time(client)
        zero.outcome.each_time(client)
        time.sleep(0.05)
    assert not client.check([rendezvous.AGAIN]) and not double.outcome
    assert double.report.report.waits_for == "the end of another process that takes part as node 1"
    until(lambda: zero.outcome.each_time(client) or client.check([rendezvous.AGAIN]))
    until(lambda: double.outcome)
    assert str(double.outcome) == "node 1 has restarted"


def test_a_node_that_was_left_out_waits_and_is_taken_back_after_its_pause():
    port = sockets.free_port()
    zero = node_0(port, policy=replace(POLICY, wait=0.0))
    until(lambda: zero.outcome)
    assert zero.outcome.nodes == [0] and zero.report.report.away == [1]
    late, client = node_1(port), connect(HERE, port)
    until(lambda: zero.outcome.each_time(client) or zero.report.report.returning)
    assert zero.report.report.returning == [1] and not late.outcome
    assert late.report.report.waits_for == "node 0 to take this node back, after it has waited for 0 s"


def test_nodes_that_were_started_with_other_options_are_refused():
    port = sockets.free_port()
    node_0(port, "--min-nodes=1")
    one = node_1(port, "--min-nodes=2")
    until(lambda: one.outcome)
    assert isinstance(one.outcome, PeersDiffer) and "--min-nodes=1" in str(one.outcome)


def test_a_node_that_does_not_come_is_in_the_error(monkeypatch):
    monkeypatch.setattr(rollcall, "INTERVAL", 0.01)
    zero = node_0(sockets.free_port(), seconds=0.2)
    until(lambda: zero.outcome)
    assert "node 1 did not come within 0 s" in str(zero.outcome)
    assert zero.report.report.waits_for.startswith("node 1, away for")


def test_torchrun_is_started_with_the_nodes_that_take_part(tmp_path, monkeypatch):
    from torch.distributed import run as torchrun

    from k8scifar.launch import agent
    from k8scifar.results import participants

    for name, value in {
        MIN_NODES: "1",
        FOLDER: str(tmp_path),
        participants.NODES: "",
        participants.ATTEMPT: "",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(rendezvous, "watch", lambda *_: None)
    command = (
        "--nnodes=3 --nproc-per-node=2 --node-rank=2 --master-addr=a --master-port=1 --rdzv-conf=timeout=5 -m x train"
    )
    for nodes, count, rank, sets in (([0, 2], "2", 1, ["--set=distributed.world_size=4"]), ([0, 1, 2], "3", 2, [])):
        group = waiting_room.Group("attempt", nodes, None, print)
        monkeypatch.setattr(waiting_room, "join", lambda *_, group=group: group)
        parsed = torchrun.parse_args(command.split())
        assert agent.meet_elastic(parsed, Writer("agent.json", AgentReport())) is None
        assert (parsed.nnodes, parsed.node_rank, parsed.training_script_args) == (count, rank, ["train", *sets])
