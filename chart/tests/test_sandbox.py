"""`make up` and `make down`: docker, Helm, kind, k3d and minikube are stand-ins that log.

Shows the command lines and what follows from their answers; not that the real tools take them: workflows/cluster.yml.
"""

from __future__ import annotations

import json
import shutil
import subprocess

import pytest
from cluster_stage import Stage


@pytest.fixture
def machine(stage: Stage) -> Stage:
    """A machine with docker and Helm."""
    stage.tool("docker", 'case "$1" in version) echo 28.0 ;; esac')
    stage.tool("helm", 'case "$1" in version) echo v4.1.4 ;; esac')
    return stage


def up(stage: Stage, *words: str) -> subprocess.CompletedProcess[str]:
    return stage.run("sandbox", "up", f"--folder={stage.home}/shared", *words)


@pytest.mark.parametrize(
    ("tool", "makes", "loads", "context"),
    [
        (
            "kind",
            "kind create cluster --name=k8scifar --config=- --wait=180s",
            "kind load docker-image",
            "kind-k8scifar",
        ),
        (
            "k3d",
            "k3d cluster create k8scifar --agents=2 --volume={}/shared:/k8scifar@all",
            "k3d image import",
            "k3d-k8scifar",
        ),
        (
            "minikube",
            "minikube start --profile=k8scifar --driver=docker --nodes=2",
            "minikube --profile=k8scifar image load",
            "k8scifar",
        ),
    ],
)
def test_up_makes_a_cluster_loads_the_image_and_installs(machine, tool, makes, loads, context):
    machine.tool(tool, "cat >/dev/null" if tool == "kind" else "")
    done = up(machine, "--set", "train.epochs=1")
    assert done.returncode == 0, done.stderr
    order = [makes.format(machine.home), loads, "helm upgrade --install cifar"]
    at = [next(index for index, line in enumerate(machine.others) if line.startswith(start)) for start in order]
    assert at == sorted(at)
    install = machine.others[at[-1]]
    assert f"--kube-context={context}" in install and install.endswith("--set train.epochs=1")
    assert "--set=user.uid=0" not in install and "--set=image.repository=k8scifar" in install
    assert (machine.home / "shared").is_dir()
    assert "make status" in done.stdout


def test_up_gives_kind_two_workers_that_share_a_folder(machine):
    machine.tool("kind", f'case "$1" in create) cat >{machine.home}/config ;; esac')
    assert up(machine).returncode == 0
    config = json.loads((machine.home / "config").read_text())
    assert [node["role"] for node in config["nodes"]] == ["control-plane", "worker", "worker"]
    mount = {"hostPath": str(machine.home / "shared"), "containerPath": "/k8scifar"}
    assert all(node["extraMounts"] == [mount] for node in config["nodes"][1:])


def test_up_again_uses_the_cluster_and_down_deletes_it(machine):
    machine.tool("kind", 'case "$2" in clusters) echo k8scifar ;; esac')
    done = up(machine)
    assert done.returncode == 0 and "exists already" in done.stdout
    assert not [line for line in machine.others if line.startswith("kind create")]
    done = machine.run("sandbox", "down", f"--folder={machine.home}/shared")
    assert done.returncode == 0 and machine.others[-1] == "kind delete cluster --name=k8scifar"
    assert "data and runs stay" in done.stdout


@pytest.mark.parametrize(
    ("present", "words"),
    [
        ((), "neither kind, k3d nor minikube is installed"),
        (("kind",), "docker is not installed"),
        (("kind", "docker"), "docker does not answer (Cannot connect"),
        (("kind", "docker", "helm"), "failed; its messages are above"),
    ],
)
def test_up_says_what_is_missing(stage, present, words):
    for name in present:
        stage.tool(name, {"docker": "echo Cannot connect >&2; exit 1"}.get(name, ""))
    if "helm" in present:
        stage.tool("docker", 'case "$1" in version) echo 28 ;; esac')
        stage.tool("kind", 'case "$1" in create) exit 1 ;; esac')
    # Nothing but the stand-ins: this machine may have a docker of its own.
    for needed in ("sh", "cat", "git"):
        if found := shutil.which(needed):
            (stage.bin / needed).symlink_to(found)
    done = stage.run("sandbox", "up", f"--folder={stage.home}/shared", PATH=str(stage.bin))
    assert done.returncode == 2, done.stdout + done.stderr
    assert words in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
