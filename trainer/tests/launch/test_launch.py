"""The launcher: what it starts and refuses; with real torchrun."""

import contextlib
import ipaddress
import json
import os
import re
import shutil
import socket
import ssl
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from runs import REPOSITORY

from k8scifar import machine
from k8scifar.config import loading
from k8scifar.errors import UserError
from k8scifar.launch import command, kubernetes, processes, sockets

PYTHON = sys.executable


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
def test_a_machine_without_a_number_needs_node_rank(environment):
    with pytest.raises(UserError, match="give --node-rank"):
        command.node_rank(2, environment)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--nnodes=2", "--node-rank=2"], "must be from 0 to 1"),
        (["--nnodes=2", "--node-rank=1"], "--master-addr"),
        (["--nproc-per-node=7"], "7 ranks can't share: each needs one; set micro_batch to 30, or start 6 ranks"),
        (["--nproc-per-node=4", "--set=distributed.comm=local-sgd"], "can't share equally"),
        (["--master-port=70000"], "1 to 65535"),
        (["--wait=0"], "above 0"),
        (["--set=epohcs=3"], "did you mean 'epochs'"),
        (["--config=/nowhere.yaml"], "/nowhere.yaml"),
        (["--nnodes=2", "--node-rank=0", "--master-addr=192.0.2.1"], "resolves to the loopback address only"),
        (["--set=distributed.interface=eth77"], "distributed.interface is eth77, which this machine does not have"),
        (["GLOO_SOCKET_IFNAME=eth77"], "GLOO_SOCKET_IFNAME is eth77, which this machine does not have"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(arguments, words):
    if "loopback" in words and not sockets.leads_nowhere(socket.gethostname()):
        pytest.skip("this host's name leads to it")
    variables = dict(each.split("=") for each in arguments if not each.startswith("-"))  # left in the shell
    command = [PYTHON, "-m", "k8scifar", "launch", *(each for each in arguments if each.startswith("-"))]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | variables)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and words in done.stderr


def test_a_training_on_one_machine_is_alone_there(tiny_config, tiny_data, tmp_path):
    """No random.py of the working folder is imported, only loopback ports listen, and TMPDIR is empty at the end."""
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
def test_the_launcher_imports_no_torch(module):
    script = f"import sys, k8scifar.cli, k8scifar.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([PYTHON, "-c", script]).returncode == 0


def test_a_port_in_use_is_told(tmp_path):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        command = [PYTHON, "-m", "k8scifar", "launch", f"--master-port={port}", "--runs-dir", str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and f"port {port}" in done.stderr


def test_cores_follow_the_containers_limit(tmp_path):
    here = machine.usable_cpus(tmp_path)
    assert here == len(os.sched_getaffinity(0))
    (tmp_path / "cpu.max").write_text("100000 100000\n")
    assert machine.usable_cpus(tmp_path) == 1
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    assert machine.usable_cpus(tmp_path) == 1
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert machine.usable_cpus(tmp_path) == here


def test_gpus_are_counted_from_device_files(tmp_path):
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
        (4, 1, ["global_batch=250", "micro_batch=50"], 3),  # 5 micro-batches: 2 + 2 + 1; 4 ranks are no faster
        (4, 1, ["global_batch=250", "micro_batch=50", "distributed.comm=local-sgd"], 1),
        (0, 1, ["global_batch=250", "micro_batch=50"], 2),
        (4, 1, ["global_batch=1000"], 4),
        (3, 1, [], 3),  # 2 + 2 + 2
        (3, 1, ["micro_batch=120"], 2),  # 2 micro-batches
        (8, 1, ["hardware.device=cpu"], 2),
        (0, 1, ["micro_batch=240"], 1),
    ],
)
def test_the_default_number_of_processes(gpus, nnodes, sets, wanted, monkeypatch, capsys):
    monkeypatch.setattr(machine, "usable_gpus", lambda environment: gpus)
    assert command.processes(loading.load(sets=sets), nnodes, {}) == wanted
    used = gpus and "hardware.device=cpu" not in sets and wanted < gpus
    assert (f"using {wanted} of {gpus} GPUs" in capsys.readouterr().err) == bool(used)


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
