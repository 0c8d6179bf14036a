"""How the chart's containers begin and end: nobody waits for another pod, SIGTERM is heard, probes do not cry early."""

import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from chart_helpers import FILES, NFS, ROOT, container, layers, one, pods, render, run, trainer

pytestmark = pytest.mark.helm
BIN = Path(sys.executable).parent
EVERYTHING = (*NFS, "--set=completion.policy=scaleDown,dataset.s3Endpoint=http://m:9000,dataset.credentialsSecret=s")
KINDS = [*map(layers, FILES), EVERYTHING, (*NFS, "--set=preflight.enabled=false")]


def containers(objects):
    return [item for pod in pods(objects) for item in pod["containers"] + pod.get("initContainers", [])]


@pytest.mark.parametrize("options", KINDS)
def test_tini_is_process_1_of_every_container(options):
    """Process 1 without a handler ignores SIGTERM until the grace period ends; tini passes it on."""
    found = containers(render(*options))
    assert len(found) >= 4
    dockerfile = (ROOT / "image" / "Dockerfile").read_text()
    assert 'ENTRYPOINT ["tini", "--", "k8scifar"]' in dockerfile
    for item in found:
        if "command" in item:
            assert item["command"][:2] == ["tini", "--"], item["name"]
        else:  # the image's own entry point
            assert item["args"][0] in ("preflight", "launch", "status")


@pytest.mark.parametrize("kind", ["StatefulSet", "Job"])
def test_no_init_container_knows_another_pod(kind):
    objects = render(*NFS, f"--set=workload.kind={kind},train.distributed.interface=eth0")
    inits = trainer(objects)["initContainers"]
    assert [item["name"] for item in inits] == ["preflight", "prepare"]
    folders = [word for word in container(trainer(objects))["args"] if word.startswith(("--data-dir", "--runs-dir"))]
    assert inits[0]["args"] == ["preflight", *folders, "--min-free=512", "--interface=eth0"]
    assert inits[1]["args"] == [folders[0], "--source=cifar10"]
    for item in inits:
        assert not re.search("wait|master|nnodes|config=", " ".join([*item.get("command", []), *item["args"]]))
    # The supervisor waits, Ready meanwhile: for its peers, and for the data set.
    assert {"--wait=300", "--data-wait=1800"} <= set(container(trainer(objects))["args"])


def test_pod_1_alone_gets_through_its_init_containers(tmp_path):
    """The real commands, as the controller runs them after a corrected value: pod 0 is of the old revision."""
    environment = {"PATH": f"{BIN}:{os.environ['PATH']}", "POD_NAME": "cifar-1", "HOME": str(tmp_path)}
    for item in trainer(render(*NFS, "--set=preflight.freeMiB=1"))["initContainers"]:
        command = [*item.get("command", ["tini", "--", "k8scifar"])[2:], *item["args"]]
        here = [word.replace("/volumes", str(tmp_path)) for word in command]
        done = subprocess.run(here, env=environment, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
    assert done.stdout == "pod 0 prepares the data set\n"


def test_preparing_ends_when_it_is_told_to(tmp_path):
    """The shell gives its place to the command, so that tini's signal reaches that."""
    item = container(trainer(render(*NFS)), "prepare")
    stub = tmp_path / "k8scifar"
    stub.write_text('#!/bin/sh\necho "started $$"\nexec sleep 600\n')
    stub.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "POD_NAME": "cifar-0"}
    command = [*item["command"][2:], *item["args"]]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == f"started {process.pid}\n"
    process.terminate()
    assert process.wait(60) == -signal.SIGTERM


def probe(item, name, **replaced):
    text = [word for word in item[name]["exec"]["command"]]
    for old, new in replaced.values():
        text = [word.replace(old, new) for word in text]
    return text


def test_the_start_up_probe_waits_in_the_container_and_is_quiet(tmp_path):
    item = container(trainer(render(*NFS)))
    beat = tmp_path / "heartbeat"
    here = probe(item, "startupProbe", beat=("/tmp/heartbeat", str(beat)))
    process = subprocess.Popen(here, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    threading.Timer(1.5, beat.touch).start()
    assert (process.communicate(timeout=60), process.returncode) == (("", ""), 0)
    # Without a heartbeat it ends before the kubelet ends it, in one line.
    late = probe(
        item, "startupProbe", beat=("/tmp/heartbeat", str(tmp_path / "none")), pause=("sleep 1", "echo a second")
    )
    done = subprocess.run(late, capture_output=True, text=True, check=False, timeout=60)
    lines = done.stdout.splitlines()
    assert (done.returncode, done.stderr, lines[-1]) == (1, "", "no heartbeat yet")
    assert lines.count("a second") < item["startupProbe"]["timeoutSeconds"]


@pytest.mark.parametrize("seconds", [10, 19, 20, 21, 300, 301, 3600])
def test_a_start_may_take_as_long_as_it_is_given(seconds):
    given = container(trainer(render(*NFS, f"--set=probes.startupSeconds={seconds}")))["startupProbe"]
    (tries,) = re.findall(r"seq (\d+)", given["exec"]["command"][2])
    assert seconds <= int(tries) * given["failureThreshold"] < seconds + int(tries)
    assert int(tries) < given["timeoutSeconds"]


def test_the_liveness_probe_fails_for_an_old_heartbeat_in_one_line(tmp_path):
    beat = tmp_path / "heartbeat"
    here = probe(container(trainer(render(*NFS))), "livenessProbe", beat=("/tmp/heartbeat", str(beat)))
    late = (1, "no heartbeat for 600 s\n", "")
    for age, expected in ((None, late), (0, (0, "", "")), (601, late)):
        if age is not None:
            beat.touch()
            os.utime(beat, (time.time() - age, time.time() - age))
        done = subprocess.run(here, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout, done.stderr) == expected, age


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_tensorboards_start_up_probe_sees_the_port(family):
    (board,) = one(render(*NFS), "Deployment")["spec"]["template"]["spec"]["containers"]
    (port,) = board["ports"]
    assert f"--port={port['containerPort']}" in board["args"]
    assert f":{port['containerPort']:04X} " in board["startupProbe"]["exec"]["command"][2]
    with socket.socket(family) as server:
        try:
            server.bind(("::" if family == socket.AF_INET6 else "0.0.0.0", 0))
        except OSError:
            pytest.skip("this machine has no IPv6")
        free = f":{server.getsockname()[1]:04X} "
        here = probe(board, "startupProbe", port=(":1776 ", free), pause=("sleep 1", "true"))
        done = subprocess.run(here, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (1, "TensorBoard does not listen yet\n", "")
        server.listen()
        done = subprocess.run(here, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("major", "policy"), [(3, {"before-hook-creation"}), (4, {"before-hook-creation", "hook-succeeded"})]
)
def test_the_tests_pod_lets_go_of_its_claim_where_its_log_can_be_had(major, policy):
    """Helm 4.1 prints the log of a test before it deletes its pod, Helm 3 after: there --logs would fail."""
    annotations = one(render(*NFS, major=major), "Pod")["metadata"]["annotations"]
    assert set(annotations["helm.sh/hook-delete-policy"].split(",")) == policy


@pytest.mark.parametrize("kind", ["StatefulSet", "Job"])
def test_every_container_knows_its_release(kind):
    objects = render(*NFS, "--namespace=lab", f"--set=workload.kind={kind}", release="mine")
    fields = {
        "POD_NAME": "metadata.name",
        "POD_UID": "metadata.uid",
        "POD_NAMESPACE": "metadata.namespace",
        "NODE_NAME": "spec.nodeName",
    }
    pod = trainer(objects)
    for item in pod["containers"] + pod["initContainers"]:
        there = {entry["name"]: entry for entry in item["env"]}
        assert len(there) == len(item["env"])
        assert there["K8SCIFAR_RELEASE"]["value"] == "lab/mine"
        for name, path in fields.items():
            assert there[name]["valueFrom"] == {"fieldRef": {"fieldPath": path}}
    for reader in pods(objects):  # TensorBoard's and the test's pods, too
        assert {"name": "K8SCIFAR_RELEASE", "value": "lab/mine"} in reader["containers"][0]["env"]


def test_notes_say_when_images_are_made_up():
    def first_line(source):
        done = run(*NFS, f"--set=dataset.source={source}", "--dry-run=client", verb="install")
        return done.stdout.partition("NOTES:")[2].strip().splitlines()[0]

    assert "synthetic images" in first_line("synthetic") and "synthetic images" in first_line("synthetic:100:10")
    for source in ("cifar10", "auto"):
        assert first_line(source).endswith("on CIFAR-10.")
    assert "synthetic" not in first_line("imagefolder:/x") and "CIFAR" not in first_line("imagefolder:/x")


@pytest.mark.skipif(not shutil.which("kubectl"), reason="needs kubectl on PATH")
def test_the_commands_of_the_notes_work_while_the_pods_still_initialise(api):
    template = one(render(*NFS, "--namespace=lab"), "StatefulSet")["spec"]["template"]
    status = {"phase": "Pending", "containerStatuses": [], "initContainerStatuses": []}
    pod = {"kind": "Pod", "apiVersion": "v1", "spec": template["spec"], "status": status}
    pod["metadata"] = {"name": "cifar-0", "namespace": "lab", "labels": template["metadata"]["labels"]}
    api.items = [pod]
    words = 'container "{}" in pod "cifar-0" is waiting to start: PodInitializing'
    for name in ("prepare", "trainer"):
        api.refuse_log(name, words.format(name))
    notes = run(*NFS, "--dry-run=client", "-n=lab", verb="install").stdout.partition("NOTES:")[2]
    lines = [line.strip() for line in notes.splitlines() if line.strip().startswith("kubectl")]
    commands = [shlex.split(command) for line in lines for command in line.split(" && ")]
    done = {}
    for command in commands:
        if not {"port-forward", "delete"} & set(command):
            answer = api.call(command)
            assert answer.returncode == 0, (command, answer.stderr)
            done[command[3] if command[1] == "-n" else "pv"] = answer
    assert set(done) == {"get", "logs", "pv"}
    assert "log of preflight" in done["logs"].stdout
    assert "maximum allowed concurrency" not in done["logs"].stderr
    deletes = [" ".join(command) for command in commands if "delete" in command]
    assert deletes[0] == "kubectl -n lab delete pod cifar-0", "of a former revision that hangs"
