"""The launcher with torchrun itself, whose ranks are stand-ins, and how the nodes' agents meet."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from runs import HELPERS

PYTHON = sys.executable
STUBS = HELPERS / "stubs"


WATCHER = """
import sys, time
from k8scifar.launch import rendezvous, reports
report = reports.Writer("agent.json", reports.AgentReport())
rendezvous.watch("127.0.0.1", int(sys.argv[1]), "JOB", report)
time.sleep(60)
"""


def free() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def launched(folder: Path, stub: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """`k8scifar launch` with real torchrun, whose ranks run `stub`."""
    environment = os.environ | {"PYTHONPATH": str(STUBS), "STUB_TRAIN": stub} | environment
    command = [PYTHON, "-m", "k8scifar", "launch", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, cwd=folder)


def test_torchrun_gives_every_rank_its_place_and_options(tmp_path):
    stub = """
def train(arguments):
    import json, os, sys
    keys = "RANK WORLD_SIZE LOCAL_RANK MASTER_ADDR OMP_NUM_THREADS".split()
    sys.stdout.write(json.dumps({key: os.environ[key] for key in keys} | {"arguments": arguments}) + "\\n")
    return 0
"""
    done = launched(
        tmp_path,
        stub,
        "--nproc-per-node=2",
        "--recipe=quick",
        "--data-dir=a b",
        "--set=epochs=3",
        "--set=hardware.threads=7",
    )
    assert done.returncode == 0, done.stderr
    ranks = sorted(map(json.loads, done.stdout.splitlines()), key=lambda rank: rank["RANK"])
    assert [rank["RANK"] for rank in ranks] == ["0", "1"]
    assert {rank["WORLD_SIZE"] for rank in ranks} == {"2"}
    assert {rank["OMP_NUM_THREADS"] for rank in ranks} == {"7"}
    assert ranks[0]["arguments"] == [
        "--recipe=quick",
        "--data-dir=a b",
        "--set=epochs=3",
        "--set=hardware.threads=7",
        "--set=distributed.world_size=2",
    ]


def test_torchrun_adds_no_noise_to_a_users_mistake(tmp_path):
    stub = """
def train(arguments):
    import os
    from k8scifar.errors import UserError
    if os.environ["RANK"] == "0":
        raise UserError("there is no data")
    return 2
"""
    log = tmp_path / "log"
    done = launched(tmp_path, stub, "--nproc-per-node=2", "--restart=always", K8SCIFAR_TERMINATION_LOG=str(log))
    assert done.returncode == 2
    assert done.stderr == "k8scifar: error: there is no data\n"
    assert log.read_text() == "there is no data\n"


def test_a_rank_that_is_killed_is_named(tmp_path):
    stub = """
def train(arguments):
    import os, time
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), 9)
    time.sleep(60)
"""
    begun = time.monotonic()
    done = launched(tmp_path, stub, "--nproc-per-node=2")
    assert done.returncode == 4
    assert done.stderr == "k8scifar: rank 1 died of SIGKILL: if nobody killed it, the machine was out of memory\n"
    assert time.monotonic() - begun < 60


def test_a_node_that_restarts_ends_all_agents():
    from torch.distributed import TCPStore

    from k8scifar.launch import rendezvous

    port = free()
    store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    assert rendezvous.visit("127.0.0.1", port, 1, "JOB", 10.0) is not None
    watcher = subprocess.Popen([PYTHON, "-c", WATCHER, str(port)])
    try:
        assert rendezvous.visit("127.0.0.1", port, 2, "JOB", 10.0) is not None
        time.sleep(1.0)
        assert watcher.poll() is None

        def come_again():
            with pytest.raises(TimeoutError):
                rendezvous.visit("127.0.0.1", port, 1, "JOB", 6.0)

        again = threading.Thread(target=come_again)
        again.start()
        assert watcher.wait(40) == 1
        again.join(20)
        assert store.get(rendezvous.AGAIN) == b"node 1 has restarted"
    finally:
        watcher.kill()


def test_a_node_that_is_alone_times_out():
    from k8scifar.launch import rendezvous

    with pytest.raises(TimeoutError, match="node 0 did not answer"):
        rendezvous.visit("127.0.0.1", free(), 1, "JOB", 1.0)
