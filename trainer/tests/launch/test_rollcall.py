"""The roll call at a real store: who answers takes part, who comes later waits, of two with one number one does."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import pytest
from patience import patient

from k8scifar.errors import PeersDiffer
from k8scifar.launch import sockets
from k8scifar.launch.elastic import meeting, rollcall
from k8scifar.launch.elastic.attendance import Orders
from k8scifar.launch.scratch import Scratch
from k8scifar.ranks.store import connect

HERE = "127.0.0.1"
ORDERS = Orders(allowed=[1, 2], expected=[0, 1], pauses=[0.5, 0.5], missed=0.0, wait=1e9, met=True)


class Left(Exception):
    """An agent has ended."""


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """``calls(function, ...)`` runs one node's part in a thread, with a scratch folder: (what came of it, scratch)."""

    def leave(reason: str) -> None:
        raise Left(reason)

    monkeypatch.setattr(meeting, "leave", leave)
    monkeypatch.setattr(rollcall, "SILENT", 1.0)
    found: list = []

    def call(function, *arguments):
        (tmp_path / str(len(found))).mkdir()
        scratch, outcome = Scratch(tmp_path / str(len(found)), 1), []
        found.append(outcome)

        def run() -> None:
            try:
                outcome.append(function(*arguments, scratch, 60.0))
            except Exception as error:
                outcome.append(error)

        threading.Thread(target=run, daemon=True).start()
        return outcome, scratch

    return call


def until(condition) -> None:
    end = time.monotonic() + patient(30)
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_who_answers_takes_part_and_a_second_of_the_same_number_only_once_the_first_is_silent(calls):
    port = sockets.free_port()
    zero, _ = calls(rollcall.call, HERE, port, "job", ORDERS)
    one, _ = calls(rollcall.answer, HERE, port, 1, "job")
    until(lambda: zero and one)
    assert zero[0].nodes == one[0].nodes == [0, 1] and zero[0].attempt == one[0].attempt
    client, double = connect(HERE, port), calls(rollcall.answer, HERE, port, 1, "job")
    for _ in range(40):  # twice as long as a silence
        one[0].look(client)
        zero[0].look(client)
        time.sleep(0.05)
    assert not client.check([meeting.AGAIN]) and not double[0]
    assert double[1].waits_for == "the end of another process that takes part as node 1"
    until(lambda: zero[0].look(client) or client.check([meeting.AGAIN]))
    until(lambda: double[0])
    assert str(double[0][0]) == "node 1 has started anew"


def test_who_was_left_out_waits_and_is_welcome_after_its_pause(calls):
    port = sockets.free_port()
    zero, desk = calls(rollcall.call, HERE, port, "job", replace(ORDERS, wait=0.0))
    until(lambda: zero)
    assert zero[0].nodes == [0] and desk.called["gone"] == [1]
    late, scratch = calls(rollcall.answer, HERE, port, 1, "job")
    client = connect(HERE, port)
    until(lambda: zero[0].look(client) or desk.welcome)
    assert desk.welcome == [1] and not late
    assert scratch.waits_for.startswith("its turn: training went on with node 0")


def test_nodes_that_were_started_otherwise_are_told(calls):
    port = sockets.free_port()
    calls(rollcall.call, HERE, port, "--min-nodes=1", ORDERS)
    one, _ = calls(rollcall.answer, HERE, port, 1, "--min-nodes=2")
    until(lambda: one)
    assert isinstance(one[0], PeersDiffer) and "--min-nodes=1" in str(one[0])


def test_who_does_not_come_is_named(calls, monkeypatch):
    monkeypatch.setattr(rollcall, "EVERY", 0.01)
    zero, scratch = calls(lambda scratch, _: rollcall.call(HERE, sockets.free_port(), "job", ORDERS, scratch, 0.2))
    until(lambda: zero)
    assert "node 1 did not come within 0 s" in str(zero[0])
    assert scratch.waits_for.startswith("node 1, gone for")


def test_torchrun_is_started_with_those_who_take_part(tmp_path, monkeypatch):
    from torch.distributed import run as torchrun

    from k8scifar.launch import agent
    from k8scifar.results import participants

    for name, value in {meeting.MIN_NODES: "1", "K8SCIFAR_SCRATCH": str(tmp_path), participants.NODES: ""}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv(participants.ATTEMPT, "")
    monkeypatch.setattr(meeting, "watch", lambda *_: None)
    command = (
        "--nnodes=3 --nproc-per-node=2 --node-rank=2 --master-addr=a --master-port=1 --rdzv-conf=timeout=5 -m x train"
    )
    for nodes, count, rank, sets in (([0, 2], "2", 1, ["--set=distributed.world_size=4"]), ([0, 1, 2], "3", 2, [])):
        party = rollcall.Party("attempt", nodes, None, print)
        monkeypatch.setattr(rollcall, "answer", lambda *_, party=party: party)
        parsed = torchrun.parse_args(command.split())
        assert agent._call_the_roll(parsed) is None
        assert (parsed.nnodes, parsed.node_rank, parsed.training_script_args) == (count, rank, ["train", *sets])
