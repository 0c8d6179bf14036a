"""When the supervisor retries, what it waits for and how it ends; with stand-ins for torchrun.

test_recovery.py and test_two_hosts.py show that torchrun and the ranks end in these ways.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from patience import patient

from k8scifar.launch import sockets
from k8scifar.results import node_status

PYTHON = sys.executable


DRIVER = """
import os, sys
from k8scifar.config import loading
from k8scifar.launch.node import NodeSpec
from k8scifar.launch.supervisor import Supervisor

class Fake(NodeSpec):
    def command(self, port):
        return [sys.executable, "-c", os.environ["FAKE"]]

options = eval(os.environ["OPTIONS"])
sets = [f"runs_dir={os.environ['RUNS']}", f"data.dir={os.environ['DATA']}", "distributed.timeout_seconds=5"]
config = loading.load(None, sets, "demo")
sys.exit(Supervisor(Fake(config=config, train_arguments=[], **options)).run())
"""


RANK = """
import json, os, pathlib, signal, sys, time
reports = pathlib.Path(os.environ["K8SCIFAR_REPORTS"])
attempts = pathlib.Path(os.environ["RUNS"], "attempts")
attempts.mkdir(exist_ok=True)
attempt = len(list(attempts.iterdir())) + 1
(attempts / str(attempt)).write_text(str(time.time()))
(reports / "rank-0.json").write_text("{}")
def end(code, reason=""):
    (reports / "rank-0.json").write_text(json.dumps({"exit_code": code, "reason": reason}))
    sys.exit(min(code, 1))
"""


@pytest.fixture
def supervised(tmp_path):
    """Start a supervisor around a script; both end with the test."""
    started = []
    prepared = tmp_path / "prepared"
    prepared.mkdir()
    (prepared / "manifest.json").write_text("{}")

    def start(fake: str, data: Path = prepared, **options) -> subprocess.Popen:
        environment = dict(os.environ) | {
            "FAKE": RANK + fake,
            "OPTIONS": repr({"pause": 0.2} | options),
            "RUNS": str(tmp_path),
            "DATA": str(data),
            "K8SCIFAR_TERMINATION_LOG": str(tmp_path / "termination-log"),
            "K8SCIFAR_HEARTBEAT": str(tmp_path / "heartbeat"),
        }
        started.append(
            subprocess.Popen([PYTHON, "-c", DRIVER], env=environment, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
        )
        return started[-1]

    yield start
    for process in started:
        process.terminate()  # a killed supervisor would leave its stand-in behind
        process.communicate(timeout=20)


def attempts(tmp_path) -> int:
    return len(list((tmp_path / "attempts").glob("*")))


def until(condition, seconds=20.0):
    end = time.monotonic() + patient(seconds)
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def finish(tmp_path, epochs=10_000):
    (tmp_path / "demo").mkdir(exist_ok=True)
    (tmp_path / "demo" / "summary.json").write_text(json.dumps({"epochs": epochs, "config_fingerprint": "x"}))


@pytest.mark.parametrize(
    ("fake", "restart", "code"),
    [
        ('end(2, "no data there")', True, 2),  # a user's mistake
        ('end(1, "no data there")', False, 1),
        ('end(5, "no data there")', False, 1),  # a lost peer; scripts and Jobs know the codes 0 to 4
    ],
)
def test_a_final_failure_ends_with_its_reason(supervised, tmp_path, fake, restart, code):
    process = supervised(fake, restart=restart)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors, attempts(tmp_path)) == (code, "", 1)  # the rank has logged its error
    assert (tmp_path / "termination-log").read_text() == "no data there\n"


def test_a_failure_is_tried_again_without_a_growing_pause_and_without_leftovers(supervised, tmp_path):
    fake = """
import subprocess
if attempt < 5:
    if attempt > 1:
        stale = pathlib.Path(os.environ["RUNS"], "stale")
        assert not os.path.exists(f"/proc/{stale.read_text()}"), "a process of the former attempt is alive"
    orphan = subprocess.Popen(["sleep", "1000"], start_new_session=True)
    pathlib.Path(os.environ["RUNS"], "stale").write_text(str(orphan.pid))
    os.kill(os.getpid(), signal.SIGKILL)
end(0)
"""
    process = supervised(fake, restart=True)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert attempts(tmp_path) == 5
    assert errors.count("the next starts in") == 4
    pauses = [float(line.split("starts in ")[1].split()[0]) for line in errors.splitlines()]
    assert all(0.1 <= pause <= 0.31 for pause in pauses)


def test_a_failure_of_its_own_ends_the_process_with_its_reason_after_some_tries(supervised, tmp_path):
    process = supervised('end(4, "rank 0 failed: ValueError: no such thing")', restart=True, pause=0.05)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 4
    assert attempts(tmp_path) == 5
    starts = [float((tmp_path / "attempts" / str(number)).read_text()) for number in range(1, 6)]
    assert starts[4] - starts[3] > starts[1] - starts[0], "the pauses grow"
    assert "a peer" not in errors and "attempt 4 ended (rank 0 failed: ValueError: no such thing)" in errors
    reason = "failed 5 times without a new checkpoint between: rank 0 failed: ValueError: no such thing"
    assert errors.splitlines()[-1] == f"k8scifar: error: {reason}"
    assert (tmp_path / "termination-log").read_text() == f"{reason}\n"
    assert node_status.read(tmp_path / "demo")[0]["state"] == "failed"


def test_failures_of_its_own_with_new_checkpoints_between_are_tried_again(supervised, tmp_path):
    fake = """
folder = pathlib.Path(os.environ["RUNS"], "demo", "checkpoints")
folder.mkdir(parents=True, exist_ok=True)
(folder / f"step-{attempt:08d}-0123456789abcdef.pt").touch()
if attempt < 8:
    end(4, "rank 0 failed")
end(0)
"""
    process = supervised(fake, restart=True, pause=0.05)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert attempts(tmp_path) == 8


def test_storage_that_fails_is_tried_for_ever_with_growing_pauses(supervised, tmp_path):
    process = supervised('end(1 if attempt < 8 else 0, "the volume is away")', restart=True, pause=0.02)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert attempts(tmp_path) == 8
    pauses = [float(found) for found in re.findall(r"the next starts in ([\d.]+) s", errors)]
    assert pauses[-1] > pauses[0] and "the volume is away" in errors


def test_data_that_another_node_prepares_is_waited_for_in_the_container_and_told(supervised, tmp_path):
    options = {"nnodes": 2, "node_rank": 1, "master_addr": "localhost", "restart": True, "data_wait": 1.0}
    process = supervised("end(0)", data=tmp_path / "data", **options)
    until(lambda: (tmp_path / "termination-log").exists())
    assert "there is no data set in" in (tmp_path / "termination-log").read_text()
    assert process.poll() is None and attempts(tmp_path) == 0
    until(lambda: 1 in node_status.read(tmp_path / "demo"))
    assert node_status.read(tmp_path / "demo")[1]["reason"].startswith("there is no data set in")
    before = (tmp_path / "heartbeat").stat().st_mtime_ns
    until(lambda: (tmp_path / "heartbeat").stat().st_mtime_ns > before)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "manifest.json").write_text("{}")
    until(lambda: attempts(tmp_path) == 1)
    process.terminate()
    process.communicate(timeout=30)


def test_a_torchrun_that_is_frozen_is_ended_and_started_again(supervised, tmp_path):
    fake = """
if attempt == 1:
    (reports / "agent.json").write_text('{"beats": 1}')
    os.kill(os.getpid(), signal.SIGSTOP)
end(0)
"""
    process = supervised(fake, restart=True)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert attempts(tmp_path) == 2
    assert "torchrun is frozen: it has shown no sign of life for 10 s" in errors


@pytest.mark.parametrize(
    ("fake", "when_done", "code"),
    [
        ("signal.signal(signal.SIGTERM, lambda *_: end(3)); time.sleep(60)", "exit", 3),
        ("signal.signal(signal.SIGTERM, lambda *_: end(3)); time.sleep(60)", "hold", 0),
        ("time.sleep(60)", "hold", 1),  # dies of SIGTERM without saving
        ("signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)", "hold", 1),  # has to be killed
    ],
)
def test_sigterm_is_passed_on_and_answered_in_time(supervised, tmp_path, fake, when_done, code):
    process = supervised(f"{fake}", when_done=when_done, shutdown_timeout=-3)
    until(lambda: attempts(tmp_path) == 1)
    time.sleep(0.3)
    begun = time.monotonic()
    process.terminate()
    assert process.wait(30) == code
    assert time.monotonic() - begun < 5
    if code == 1:
        assert "before the ranks could save" in (tmp_path / "termination-log").read_text()


def test_a_finished_run_holds_at_once_and_idles(supervised, tmp_path):
    finish(tmp_path)
    process = supervised("end(0)", nnodes=2, node_rank=1, master_addr="localhost", restart=True, when_done="hold")
    until(lambda: (tmp_path / "termination-log").exists())
    time.sleep(1.0)
    assert process.poll() is None and attempts(tmp_path) == 0
    spent = sum(os.times()[2:4])
    clock = Path(f"/proc/{process.pid}/stat").read_text().split()
    before = int(clock[13]) + int(clock[14])
    time.sleep(3.0)
    clock = Path(f"/proc/{process.pid}/stat").read_text().split()
    assert int(clock[13]) + int(clock[14]) - before <= 3, spent  # hundredths of a second in 3 s
    assert (tmp_path / "heartbeat").exists()
    process.terminate()
    assert process.wait(10) == 0


def test_more_epochs_train_again(supervised, tmp_path):
    finish(tmp_path, epochs=1)
    process = supervised(
        "end(0)", nnodes=2, node_rank=0, master_addr="localhost", master_port=sockets.free_port(), restart=True
    )
    assert process.wait(30) == 0
    assert attempts(tmp_path) == 1


def test_a_node_that_is_done_without_a_marker_goes_on(supervised, tmp_path):
    (tmp_path / "demo").mkdir()
    fake = """
if attempt == 2:
    pathlib.Path(os.environ["RUNS"], "demo", "summary.json").write_text('{"epochs": 10000}')
end(0)
"""
    process = supervised(fake, nnodes=2, node_rank=1, master_addr="localhost", restart=True)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0
    assert attempts(tmp_path) == 2
    assert "has written no summary.json" in errors


@pytest.mark.parametrize("restart", [False, True])
def test_a_name_that_does_not_resolve_is_an_error_and_waited_for(supervised, tmp_path, restart):
    """With restarts the container must not end for it: the kubelet's back-off would grow."""
    options = {"nnodes": 2, "node_rank": 1, "master_addr": "pod-0.nowhere.invalid", "wait": 1.0}
    process, message = supervised("end(0)", **options, restart=restart), tmp_path / "termination-log"
    until(lambda: message.exists() and "headless Service" in message.read_text())
    if restart:
        until(lambda: 1 in node_status.read(tmp_path / "demo"))
        note = node_status.read(tmp_path / "demo")[1]
        assert note["state"] == "failed" and "does not resolve" in note["reason"]
        time.sleep(1.0)
        assert process.poll() is None
    else:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 2 and "pod-0.nowhere.invalid does not resolve" in errors
    assert attempts(tmp_path) == 0


def test_a_stale_process_on_the_port_is_waited_for(supervised, tmp_path):
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("", 0))
        taken.listen()
        process = supervised("end(0)", master_port=taken.getsockname()[1], restart=True)
        time.sleep(2.0)
        assert process.poll() is None and attempts(tmp_path) == 0
    assert process.wait(20) == 0
    assert attempts(tmp_path) == 1


def test_the_heartbeat_is_the_ranks_own_once_they_train(supervised, tmp_path):
    fake = """
beat = pathlib.Path(os.environ["K8SCIFAR_HEARTBEAT"])
time.sleep(1)
os.utime(beat, (1e9, 1e9))
time.sleep(60)
"""
    supervised(fake)
    until(lambda: (tmp_path / "heartbeat").exists() and (tmp_path / "heartbeat").stat().st_mtime == 1e9)
    time.sleep(6.0)
    assert (tmp_path / "heartbeat").stat().st_mtime == 1e9


def test_the_heartbeat_is_kept_through_a_long_first_step(supervised, tmp_path):
    supervised("time.sleep(60)")
    until(lambda: attempts(tmp_path) == 1)
    first = (tmp_path / "heartbeat").stat().st_mtime
    until(lambda: (tmp_path / "heartbeat").stat().st_mtime > first, 8)


def test_signals_are_not_lost_while_waiting(supervised, tmp_path):
    process = supervised("end(0)", nnodes=2, node_rank=1, master_addr="pod-0.nowhere.invalid", restart=True)
    until(lambda: (tmp_path / "heartbeat").exists())  # it waits for the name
    process.send_signal(signal.SIGTERM)
    assert process.wait(15) == 3
