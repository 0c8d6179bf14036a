"""A node that is done, and shares no folder with the others, notices one that is not; two that are done rest."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time

import pytest
from patience import patient

from k8scifar.config import loading
from k8scifar.launch import sockets
from k8scifar.launch.node import NodeSpec
from k8scifar.launch.unfinished_nodes import Door

ASKS = "import sys; from k8scifar.launch import meeting; meeting.knock('127.0.0.1', int(sys.argv[1]), 1, 'job', 60.0)"
OPENS = """
import sys, time
from torch.distributed import TCPStore
store = TCPStore("127.0.0.1", int(sys.argv[1]), 2, is_master=True, wait_for_workers=False)
time.sleep(1000)
"""


@pytest.fixture
def port():
    return sockets.free_port()


@pytest.fixture
def door(port):
    """``door(node)``: that of a node which is done."""
    config = loading.load(None, ["distributed.storage=local"])
    opened = []

    def open_door(node: int) -> Door:
        opened.append(Door(NodeSpec(config, [], nnodes=2, node_rank=node, master_port=port)))
        return opened[-1]

    yield open_door
    for each in opened:
        each.close()


@pytest.fixture
def child(port):
    """``child(code)``: a Python process that is given the port."""
    started = []
    yield lambda code: started.append(subprocess.Popen([sys.executable, "-c", code, str(port)]))
    for process in started:
        process.kill()
        process.wait(20)


def until_it_waits(door: Door) -> None:
    end = time.monotonic() + patient(30)
    while not door.somebody_waits():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_two_that_are_done_and_a_stranger_wake_nobody(door, port):
    first, second = door(0), door(1)
    assert not second.somebody_waits(), "nobody there"
    assert not first.somebody_waits()
    heard, stop = [], threading.Event()

    def listen() -> None:
        while not stop.wait(0.05):
            heard.append(first.somebody_waits())

    thread = threading.Thread(target=listen)
    thread.start()
    try:
        assert not second.somebody_waits(), "a door"
        with socket.create_connection(("127.0.0.1", port)) as caller:
            assert caller.recv(100) == b"k8scifar: done\n"
    finally:
        stop.set()
        thread.join(20)
    assert heard and not any(heard)


def test_node_0_hears_an_agent_that_looks_for_its_store(door, child, port):
    child(ASKS)
    first = door(0)
    until_it_waits(first)
    assert sockets.port_is_free(port)
    assert not first.somebody_waits(), "once in a while"


def test_another_node_sees_that_node_0_has_a_store(door, child):
    child(OPENS)
    until_it_waits(door(1))
