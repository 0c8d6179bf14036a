"""The launcher: what it starts, when it starts again, and how it ends. Stand-ins for torchrun, and torchrun itself."""

import contextlib
import ipaddress
import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from patience import patient
from runs import HELPERS, REPOSITORY

from k8scifar import machine
from k8scifar.config import loading
from k8scifar.errors import UserError
from k8scifar.launch import command, kubernetes, processes, sockets
from k8scifar.results import notes

PYTHON = sys.executable

# A supervisor whose torchrun is the script in FAKE.
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
import os, pathlib, signal, sys, time
scratch = pathlib.Path(os.environ["K8SCIFAR_SCRATCH"])
attempts = pathlib.Path(os.environ["RUNS"], "attempts")
attempts.mkdir(exist_ok=True)
attempt = len(list(attempts.iterdir())) + 1
(attempts / str(attempt)).write_text(str(time.time()))
(scratch / "started.0").touch()
def end(code, reason=""):
    if reason:
        (scratch / "reason.0").write_text(reason)
    (scratch / "exit.0").write_text(str(code))
    sys.exit(min(code, 1))
"""


@pytest.fixture
def supervised(tmp_path):
    """Start a supervisor around a script; all of it is killed at the end."""
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
        process.terminate()  # a supervisor that is killed outright would leave its stand-in behind
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
    ("environment", "rank"),
    [
        ({"JOB_COMPLETION_INDEX": "3", "POD_NAME": "a-1"}, 3),
        ({"POD_NAME": "cifar-1", "HOSTNAME": "b-7"}, 1),
        ({"HOSTNAME": "cifar-12"}, 12),
    ],
)
def test_the_rank_comes_from_the_pod(environment, rank):
    assert command.node_rank(20, environment) == rank
    assert command.node_rank(1, environment) == 0


@pytest.mark.parametrize("environment", [{"HOSTNAME": "laptop"}, {"JOB_COMPLETION_INDEX": "x"}, {"POD_NAME": "a-b"}])
def test_a_machine_without_a_number_must_be_told(environment):
    with pytest.raises(UserError, match="give --node-rank"):
        command.node_rank(2, environment)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--nnodes=2", "--node-rank=2"], "must be from 0 to 1"),
        (["--nnodes=2", "--node-rank=1"], "--master-addr"),
        (["--nproc-per-node=3"], "3 ranks can't share equally"),
        (["--master-port=70000"], "1 to 65535"),
        (["--wait=0"], "above 0"),
        (["--set=epohcs=3"], "did you mean 'epochs'"),
        (["--config=/nowhere.yaml"], "/nowhere.yaml"),
        (["--nnodes=2", "--node-rank=0", "--master-addr=192.0.2.1"], "resolves to the loopback address only"),
        (["--set=distributed.interface=eth77"], "distributed.interface names eth77, which this machine does not have"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(arguments, words):
    if "loopback" in words and not sockets.leads_nowhere(socket.gethostname()):
        pytest.skip("this host's name leads to it")
    done = subprocess.run([PYTHON, "-m", "k8scifar", "launch", *arguments], capture_output=True, text=True)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and words in done.stderr


def test_a_library_s_variable_left_in_the_shell_is_the_users_mistake():
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "eth77"}
    done = subprocess.run([PYTHON, "-m", "k8scifar", "launch"], capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    assert "GLOO_SOCKET_IFNAME names eth77, which this machine does not have" in done.stderr
    assert len(done.stderr.splitlines()) == 1 and "lo" in done.stderr


def test_a_training_on_one_machine_is_alone_there(tiny_config, tiny_data, tmp_path):
    """A random.py beside the command shadows nothing, nothing listens but on loopback, and TMPDIR is left empty."""
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "random.py").write_text("raise SystemExit('shadowed')\n")
    (tmp_path / "tmp").mkdir()
    command = [str(Path(PYTHON).with_name("k8scifar")), "launch", "--nproc-per-node=2", f"--config={tiny_config}"]
    command += [f"--data-dir={tiny_data}", f"--runs-dir={tmp_path}", "--name=alone", "--set=epochs=200"]
    environment = os.environ | {"TMPDIR": str(tmp_path / "tmp")}
    process = subprocess.Popen(command, cwd=tmp_path / "here", env=environment, stderr=subprocess.PIPE, text=True)
    try:
        for line in process.stderr:
            if "step " in line:
                break
        assert "step " in line
        family = {process.pid, *processes.descendants(process.pid)}
        listening = {owner: addresses for owner, addresses in listeners().items() if owner in family}
        assert listening, "the store and the ranks listen"
        assert {address for addresses in listening.values() for address in addresses} <= {"127.0.0.1", "::1"}
        process.terminate()
        process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 3
    assert list((tmp_path / "tmp").iterdir()) == []


def listeners() -> dict[int, set[str]]:
    """Process id -> addresses on which it listens."""
    inodes = {}
    for name, width in (("tcp", 8), ("tcp6", 32)):
        for line in Path("/proc/net", name).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A":
                raw = bytes.fromhex(fields[1].split(":")[0])
                groups = b"".join(raw[at : at + 4][::-1] for at in range(0, width // 2, 4))
                address = str(ipaddress.ip_address(groups))
                inodes[fields[9]] = "127.0.0.1" if address == "::ffff:127.0.0.1" else address
    found: dict[int, set[str]] = {}
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            inode = re.fullmatch(r"socket:\[(\d+)\]", os.readlink(link))
            if inode and inode[1] in inodes:
                found.setdefault(int(link.parts[2]), set()).add(inodes[inode[1]])
    return found


@pytest.mark.parametrize("module", ["launch.command", "launch.preflight", "launch.worker", "results.status"])
def test_nothing_that_supervises_imports_torch(module):
    script = f"import sys, k8scifar.cli, k8scifar.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([PYTHON, "-c", script]).returncode == 0


def test_a_users_mistake_is_not_tried_again(supervised, tmp_path):
    process = supervised('end(2, "no data there")', nnodes=1, restart=True)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 2
    assert errors == ""  # the rank has told already
    assert (tmp_path / "termination-log").read_text() == "no data there\n"
    assert attempts(tmp_path) == 1


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
    assert notes.read(tmp_path / "demo")[0]["state"] == "failed"


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


def test_a_rank_that_dies_of_a_signal_again_and_again_is_its_own_failure(tiny_config, tiny_data, tmp_path):
    """Real torchrun and ranks; each is killed as it meets the others."""
    faults = {"PYTHONPATH": str(HELPERS / "faults"), "K8SCIFAR_FAULTS_DIR": str(tmp_path / "faults")}
    (tmp_path / "faults").mkdir()
    struck = "  ".join(["call:k8scifar.training.resume.find:kill"] * 9)
    command = [PYTHON, "-m", "k8scifar", "launch", "--restart=always", f"--config={tiny_config}"]
    command += [f"--data-dir={tiny_data}", f"--runs-dir={tmp_path}", "--name=dies"]
    done = subprocess.run(
        command, env=os.environ | faults | {"K8SCIFAR_FAULTS": struck}, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 4, done.stderr
    assert "failed 5 times without a new checkpoint between: rank 0 died of SIGKILL" in done.stderr.splitlines()[-1]
    assert "a peer" not in done.stderr


def test_data_that_another_node_prepares_is_waited_for_in_the_container_and_told(supervised, tmp_path):
    options = {"nnodes": 2, "node_rank": 1, "master_addr": "localhost", "restart": True, "data_wait": 1.0}
    process = supervised("end(0)", data=tmp_path / "data", **options)
    until(lambda: (tmp_path / "termination-log").exists())
    assert "there is no data set in" in (tmp_path / "termination-log").read_text()
    assert process.poll() is None and attempts(tmp_path) == 0
    until(lambda: 1 in notes.read(tmp_path / "demo"))
    assert notes.read(tmp_path / "demo")[1]["reason"].startswith("there is no data set in")
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
    (scratch / "alive").touch()
    os.kill(os.getpid(), signal.SIGSTOP)
end(0)
"""
    process = supervised(fake, restart=True)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert attempts(tmp_path) == 2
    assert "torchrun has shown no sign of life for 10 s: frozen" in errors


def test_without_restart_a_failure_is_final(supervised, tmp_path):
    process = supervised('end(1, "disk gone")', restart=False)
    assert process.wait(30) == 1
    assert attempts(tmp_path) == 1
    assert (tmp_path / "termination-log").read_text() == "disk gone\n"


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


def test_a_lost_peer_is_an_ordinary_failure_for_who_reads_the_exit_code(supervised, tmp_path):
    """5 is between the ranks and the supervisor; scripts and Jobs know 0 to 4."""
    process = supervised('end(5, "rank 0 gave up")', restart=False)
    assert process.wait(30) == 1
    process = supervised("time.sleep(1.0); end(5)", restart=True)
    until(lambda: attempts(tmp_path) == 2)
    process.terminate()
    assert process.wait(30) == 1


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
    process = supervised("end(0)", nnodes=2, node_rank=0, master_addr="localhost", master_port=free(), restart=True)
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
    assert "left no summary.json" in errors


def test_a_name_that_never_resolves_is_told(supervised, tmp_path):
    process = supervised("end(0)", nnodes=2, node_rank=1, master_addr="pod-0.nowhere.invalid", wait=1.0)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "pod-0.nowhere.invalid does not resolve" in errors
    assert attempts(tmp_path) == 0


def test_a_name_that_does_not_resolve_for_long_is_told_and_waited_for(supervised, tmp_path):
    """The container must not end for it: the kubelet's back-off would grow."""
    process = supervised("end(0)", nnodes=2, node_rank=1, master_addr="pod-0.nowhere.invalid", restart=True, wait=1.0)
    told = tmp_path / "termination-log"
    until(lambda: told.exists() and "headless Service" in told.read_text())
    until(lambda: 1 in notes.read(tmp_path / "demo"))
    note = notes.read(tmp_path / "demo")[1]
    assert note["state"] == "failed" and "does not resolve" in note["reason"]
    time.sleep(1.0)
    assert process.poll() is None and attempts(tmp_path) == 0


def test_a_port_in_use_is_told(tmp_path):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        command = [PYTHON, "-m", "k8scifar", "launch", f"--master-port={port}", "--runs-dir", str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and f"port {port}" in done.stderr


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


def free() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def test_cores_follow_the_containers_limit(tmp_path):
    here = machine.usable_cpus(tmp_path)
    assert here == len(os.sched_getaffinity(0))
    (tmp_path / "cpu.max").write_text("100000 100000\n")
    assert machine.usable_cpus(tmp_path) == 1
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    assert machine.usable_cpus(tmp_path) == 1
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert machine.usable_cpus(tmp_path) == here


def test_gpus_are_counted_without_torch(tmp_path):
    def count(**environment):
        return machine.visible_gpus(environment, tmp_path, "no-driver.so")

    assert count() == 0
    for name in ("nvidia0", "nvidia1", "nvidia2", "nvidia3", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    assert count() == 4
    for chosen, wanted in {
        "0,3": 2, "": 0, "1,-1,2": 1, "0,NoDevFiles": 1, "1,1": 0, "0,9,1": 1, " 2 , 3": 2, "none": 0,
        "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6,GPU-5": 2, "GPU-1,0": 1, "GPU-1,GPU-1": 0,
        "MIG-GPU-8932f937/1/0,MIG-GPU-8932f937/2/0": 1, "MIG-c7384736-a75d-5afc-978f-d2f1294409fd": 1,
    }.items():  # fmt: skip
        assert count(CUDA_VISIBLE_DEVICES=chosen) == wanted, chosen


def test_the_driver_is_asked_where_there_are_no_device_files(tmp_path):
    """WSL2 has /dev/dxg alone."""
    if not shutil.which("cc"):
        pytest.skip("needs a C compiler, for a stand-in of the driver")
    source, driver = tmp_path / "driver.c", tmp_path / "libcuda.so.1"
    source.write_text(
        '#include <stdlib.h>\nint cuInit(int f) { return getenv("BROKEN") ? 999 : 0; }\n'
        "int cuDeviceGetCount(int *n) { *n = 3; return 0; }\n"
    )
    subprocess.run(["cc", "-shared", "-fPIC", "-o", driver, source], check=True)
    devices = tmp_path / "dev"
    devices.mkdir()
    assert machine.visible_gpus({}, devices, str(driver)) == 0, "neither file"
    (devices / "dxg").touch()
    assert machine.visible_gpus({}, devices, str(driver)) == 3
    assert machine.visible_gpus({"BROKEN": "1"}, devices, str(driver)) == 0


@pytest.mark.parametrize(
    ("gpus", "nnodes", "sets", "wanted"),
    [
        (0, 1, [], 2),
        (0, 2, [], 1),
        (1, 1, [], 1),
        (1, 2, [], 1),
        (4, 1, ["micro_batch=50"], 1),  # 5 micro-batches
        (4, 1, ["global_batch=1000"], 4),
        (3, 1, [], 2),  # 2 micro-batches
        (8, 1, ["hardware.device=cpu"], 2),
        (0, 1, ["micro_batch=250"], 1),
    ],
)
def test_processes_where_nobody_says_how_many(gpus, nnodes, sets, wanted, monkeypatch, capsys):
    monkeypatch.setattr(machine, "usable_gpus", lambda environment: gpus)
    assert command.processes(loading.load(sets=sets), nnodes, {}) == wanted
    used = gpus and "hardware.device=cpu" not in sets and wanted < gpus
    assert (f"{wanted} of {gpus} GPUs are used" in capsys.readouterr().err) == bool(used)


def test_make_train_leaves_the_number_of_processes_to_launch():
    for given, wanted in (("", False), ("NPROC=3", True)):
        command = ["make", "--dry-run", "train", *given.split()]
        said = subprocess.run(command, capture_output=True, text=True, check=True, cwd=REPOSITORY).stdout
        assert ("--nproc-per-node 3" in said) == wanted
        assert "--nproc-per-node" in said or not wanted


def test_scaling_down_patches_one_scale(tmp_path, monkeypatch):
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=localhost"
    command += " -addext subjectAltName=DNS:localhost -keyout key -out ca.crt"
    made = subprocess.run(command.split(), capture_output=True, check=False, cwd=tmp_path)
    if made.returncode:
        pytest.skip("openssl can't make a certificate here")
    (tmp_path / "token").write_text("secret\n")
    (tmp_path / "namespace").write_text("lab")
    asked = []

    class Api(BaseHTTPRequestHandler):
        def do_PATCH(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            asked.append((self.path, self.headers["Authorization"], self.headers["Content-Type"], json.loads(body)))
            self.send_response(200 if self.path.endswith("cifar/scale") else 403)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = HTTPServer(("localhost", 0), Api)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "ca.crt", tmp_path / "key")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "localhost")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(server.server_port))
    try:
        assert kubernetes.scale_to_zero("cifar", tmp_path) is None
        assert "403" in kubernetes.scale_to_zero("other", tmp_path)
    finally:
        server.shutdown()
        server.server_close()
    assert asked[0] == (
        "/apis/apps/v1/namespaces/lab/statefulsets/cifar/scale",
        "Bearer secret",
        "application/merge-patch+json",
        {"spec": {"replicas": 0}},
    )
    assert "can't be reached" in kubernetes.scale_to_zero("cifar", tmp_path)
    assert "service account" in kubernetes.scale_to_zero("cifar", tmp_path / "none")


def test_signals_are_not_lost_while_waiting(supervised, tmp_path):
    process = supervised("end(0)", nnodes=2, node_rank=1, master_addr="pod-0.nowhere.invalid", restart=True)
    until(lambda: (tmp_path / "heartbeat").exists())  # it waits for the name
    process.send_signal(signal.SIGTERM)
    assert process.wait(15) == 3
