"""A node that is done, and shares no folder with the others, detects one that is not."""

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
from k8scifar.launch.unfinished_nodes import UnfinishedNodes

VISITS = """
import sys
from k8scifar.launch import rendezvous
rendezvous.visit("127.0.0.1", int(sys.argv[1]), 1, "job", 60.0)
"""
OPENS_A_STORE = """
import sys, time
from torch.distributed import TCPStore
store = TCPStore("127.0.0.1", int(sys.argv[1]), 2, is_master=True, wait_for_workers=False)
time.sleep(1000)
"""


@pytest.fixture
def port():
    return sockets.free_port()


@pytest.fixture
def done(port):
    """``done(node)``: what a node that is done detects."""
    config = loading.load(None, ["distributed.storage=local"])
    opened = []

    def others(node: int) -> UnfinishedNodes:
        opened.append(UnfinishedNodes(NodeSpec(config, [], nnodes=2, node_rank=node, master_port=port)))
        return opened[-1]

    yield others
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


def until_one_waits(others: UnfinishedNodes) -> None:
    end = time.monotonic() + patient(30)
    while not others.one_waits():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_two_that_are_done_and_a_stranger_start_no_ranks(done, port):
    first, second = done(0), done(1)
    assert not second.one_waits(), "nobody there"
    assert not first.one_waits()
    heard, stop = [], threading.Event()

    def listen() -> None:
        while not stop.wait(0.05):
            heard.append(first.one_waits())

    thread = threading.Thread(target=listen)
    thread.start()
    try:
        assert not second.one_waits(), "node 0 is done"
        with socket.create_connection(("127.0.0.1", port)) as caller:
            assert caller.recv(100) == b"k8scifar: done\n"
    finally:
        stop.set()
        thread.join(20)
    assert heard and not any(heard)


def test_node_0_detects_an_agent_that_looks_for_its_store(done, child, port):
    child(VISITS)
    first = done(0)
    until_one_waits(first)
    assert sockets.port_is_free(port)
    assert not first.one_waits(), "once in a while"


def test_another_node_detects_node_0s_store(done, child):
    child(OPENS_A_STORE)
    until_one_waits(done(1))
