"""The image's tools without an engine: choices, messages, the lock, the pruning. Engines are stand-ins that log.

Shows the engines' command lines; that an engine takes them is shown by test_image_engine.py.
"""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = None

ROOT = Path(__file__).parents[2]
IMAGE = ROOT / "image"


sys.path[:0] = [str(IMAGE / "tools"), str(IMAGE / "build")]
image, prune, smoke = (importlib.import_module(name) for name in ("image", "prune", "smoke"))


class Stage:
    """A path with stand-in tools; each call of one is a line of `calls`."""

    def __init__(self, folder: Path) -> None:
        self.bin = folder / "bin"
        self.bin.mkdir()
        self.log = folder / "calls"
        self.log.touch()
        self.home = folder

    def tool(self, name: str, script: str = "exit 0") -> None:
        path = self.bin / name
        path.write_text(f'#!/bin/sh\necho "{name} $*" >>{self.log}\n{script}\n')
        path.chmod(0o755)

    @property
    def calls(self) -> list[str]:
        return self.log.read_text().splitlines()

    def call(self, starting: str) -> str:
        """The one call that starts so."""
        found = [line for line in self.calls if line.startswith(starting)]
        assert len(found) == 1, self.calls
        return found[0]

    def run(self, action: str, script: str = "image.py", **choices: str) -> subprocess.CompletedProcess[str]:
        # No find-links of this machine: the wheels are no part of these tests.
        base = {"PATH": str(self.bin), "HOME": str(self.home), "PIP_CONFIG_FILE": os.devnull}
        command = [sys.executable, str(IMAGE / "tools" / script), *([action] if action else [])]
        return subprocess.run(command, env=base | choices, text=True, capture_output=True, cwd=self.home)


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(tmp_path)


DOCKER = """case "$1" in
  buildx) exit 1 ;;
  info) echo /nowhere ;;
  version) echo 28.2.2 ;;
esac"""


def one_line(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """The command refused, as a person's mistake, in one line that has these words."""
    assert done.returncode == 2, done
    lines = done.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    for word in words:
        assert word in lines[0], lines[0]


# --- bad input


@pytest.mark.parametrize("action", ["build", "push", "load"])
def test_no_engine(stage, action):
    stage.tool("kind")
    one_line(stage.run(action, REGISTRY="example.test/me"), "no container engine found", "docker", "podman", "buildah")


def test_smoke_without_an_engine(stage):
    stage.tool("buildah")  # can build, but not run
    one_line(stage.run("", script="smoke.py"), "no container engine found", "docker or podman")


def test_asked_engine_is_missing_or_unknown(stage):
    stage.tool("docker", DOCKER)
    one_line(stage.run("build", ENGINE="podman"), "ENGINE=podman is not installed")
    one_line(stage.run("build", ENGINE="lxc"), "ENGINE=lxc", "docker, podman, buildah")


def test_engine_is_not_running(stage):
    stage.tool("docker", "echo 'Cannot connect to the Docker daemon at unix:///var/run/docker.sock' >&2; exit 1")
    one_line(stage.run("build"), "docker is installed but does not answer", "Cannot connect", "start it")


def test_engine_that_may_not_be_used(stage):
    stage.tool("docker", "echo 'permission denied while trying to connect to the Docker daemon socket' >&2; exit 1")
    one_line(stage.run("build"), "join the group docker")


def test_next_engine_is_taken_when_one_is_silent(stage):
    stage.tool("docker", "exit 1")
    stage.tool("podman")
    assert stage.run("build").returncode == 0
    assert "--build-arg=VARIANT=cpu" in stage.call("podman build")


def test_unknown_variant(stage):
    stage.tool("docker", DOCKER)
    one_line(stage.run("build", VARIANT="rocm"), "unknown VARIANT 'rocm'", "cpu or cuda")
    assert not [line for line in stage.calls if " build " in line]


def test_registry_is_missing_or_wrong(stage):
    stage.tool("docker", DOCKER)
    one_line(stage.run("push"), "REGISTRY is missing", "make push REGISTRY=")
    one_line(stage.run("push", REGISTRY="https://example.test"), "REGISTRY", "without a scheme")


def test_push_of_an_image_that_is_not_built(stage):
    stage.tool("docker", DOCKER + '\n[ "$1" != image ]')
    one_line(stage.run("push", REGISTRY="example.test/me"), "no image k8scifar:", "make image")


def test_no_space_while_building(stage):
    stage.tool("docker", DOCKER + '\n[ "$1" != build ] || { echo "write /x: no space left on device"; exit 1; }')
    one_line(stage.run("build"), "no space left", "docker system prune")


def test_no_space_before_building(monkeypatch, tmp_path):
    monkeypatch.setattr(image, "run", lambda command: subprocess.CompletedProcess(command, 0, f"{tmp_path}\n", ""))
    monkeypatch.setattr(image.shutil, "disk_usage", lambda _: _Usage(10**9))
    with pytest.raises(image.ImageError, match=r"no space: 1\.0 GB free in .*takes about 4 GB"):
        image.check_space("docker")
    monkeypatch.setattr(image.shutil, "disk_usage", lambda _: _Usage(10**10))
    image.check_space("docker")


class _Usage:
    def __init__(self, free: int) -> None:
        self.free = free


@pytest.mark.parametrize(
    "message",
    [
        "pull access denied for python, repository does not exist",
        'Get "https://example.test/v2/": dial tcp: lookup example.test: no such host',
        "Error: initializing source docker://python:3.11-slim-bookworm: pinging container registry",
    ],
)
def test_base_that_can_not_be_pulled(stage, message):
    stage.tool("docker", DOCKER + f"\n[ \"$1\" != build ] || {{ echo '{message}'; exit 1; }}")
    one_line(stage.run("build"), "base image can't be pulled", "BASE=")


def test_other_failures_keep_the_builders_words(stage):
    stage.tool("docker", DOCKER + '\n[ "$1" != build ] || { echo "something else"; exit 7; }')
    done = stage.run("build")
    one_line(done, "docker build failed (exit code 7)")
    assert "something else" in done.stdout


def test_several_platforms_need_a_builder_for_them(stage):
    stage.tool("docker", DOCKER)
    one_line(stage.run("build", PLATFORMS="amd64"), "PLATFORMS has 'amd64'", "linux/amd64")
    one_line(stage.run("build", PLATFORMS="linux/sparc64"), "linux/sparc64 binaries do not run here")
    one_line(stage.run("build", PLATFORMS="linux/amd64,linux/amd64"), "buildx")


def test_load_without_a_cluster(stage):
    stage.tool("docker", DOCKER)
    one_line(stage.run("load"), "neither k3s, kind nor minikube", "make push")
    one_line(stage.run("load", CLUSTER="k0s"), "unknown CLUSTER 'k0s'")
    one_line(stage.run("load", CLUSTER="kind"), "kind is not installed")


@pytest.mark.parametrize(("action", "tools"), [("sbom", "syft or trivy"), ("scan", "trivy or grype")])
def test_inspection_without_its_tool(stage, action, tools):
    stage.tool("docker", DOCKER)
    one_line(stage.run(action), tools)


# --- what is asked of the engine


def test_build_arguments(stage):
    stage.tool("docker", DOCKER)
    assert stage.run("build").returncode == 0
    line = stage.call("docker build ")
    assert f"--tag k8scifar:{image.version()} ." in line and "--file image/Dockerfile" in line
    assert "--build-arg=VARIANT=cpu" in line and f"--build-arg=VERSION={image.version()}" in line
    assert "TORCH_BACKEND" not in line and "BASE=" not in line and "EXTRAS" not in line


def test_extras_reach_the_build(stage):
    stage.tool("docker", DOCKER)
    assert stage.run("build", EXTRAS="remote").returncode == 0
    assert "--build-arg=EXTRAS=remote" in stage.call("docker build ")


def test_cuda_variant(stage):
    stage.tool("docker", DOCKER)
    done = stage.run("build", VARIANT="cuda", TORCH_BACKEND="cu126", BASE="mine:1", IMAGE="trainer", TAG="")
    assert done.returncode == 0
    line = stage.call("docker build ")
    for word in ("VARIANT=cuda", "TORCH_BACKEND=cu126", "BASE=mine:1"):
        assert f"--build-arg={word} " in line
    assert f"--tag trainer:{image.version()}-cuda ." in line


def test_several_platforms(stage, monkeypatch):
    monkeypatch.setattr(image, "can_emulate", lambda _: True)
    monkeypatch.setenv("PLATFORMS", "linux/amd64, linux/arm64")
    for tool in ("podman", "buildah"):
        line = " ".join(image.build_command(tool))
        assert line.startswith(f"{tool} build") and "--platform=linux/amd64,linux/arm64" in line
        assert f"--manifest k8scifar:{image.version()} ." in line
    monkeypatch.setattr(image, "has_buildx", lambda: True)
    monkeypatch.setenv("REGISTRY", "example.test/me")
    assert "--output=type=oci,dest=dist/k8scifar-" in " ".join(image.build_command("docker"))
    line = " ".join(image.build_command("docker", push=True))
    assert line.startswith("docker buildx build") and f"--push --tag example.test/me/k8scifar:{image.version()}" in line


def test_push_tags_and_pushes(stage):
    stage.tool("docker", DOCKER)
    done = stage.run("push", REGISTRY="example.test:5000/me/", TAG="7")
    assert done.returncode == 0, done.stderr
    assert stage.call("docker tag") == "docker tag k8scifar:7 example.test:5000/me/k8scifar:7"
    assert stage.call("docker push") == "docker push example.test:5000/me/k8scifar:7"
    assert "--set image.repository=example.test:5000/me/k8scifar --set image.tag=7" in done.stdout


def test_load_takes_the_cluster_that_is_there(stage):
    stage.tool("docker", DOCKER)
    stage.tool("kind")
    assert stage.run("load", TAG="7").returncode == 0
    assert stage.call("kind") == "kind load docker-image k8scifar:7"
    stage.tool("minikube")
    one_line(stage.run("load"), "kind and minikube are here", "CLUSTER=")
    stage.tool("kubectl", "echo kind-two")
    assert stage.run("load", TAG="8").returncode == 0
    assert stage.calls[-1] == "kind load docker-image k8scifar:8 --name two"
    assert stage.run("load", TAG="9", CLUSTER="minikube").returncode == 0
    assert stage.call("minikube") == "minikube image load k8scifar:9"


def test_load_into_k3s(stage):
    stage.tool("docker", DOCKER + '\n[ "$1" != save ] || : >"$3"')
    stage.tool("k3s")
    stage.tool("sudo", 'exec "$@"')
    done = stage.run("load", TAG="7")
    assert done.returncode == 0, done.stderr
    archive = stage.call("docker save").split()[3]
    assert stage.call("k3s") == f"k3s ctr images import {archive}"
    assert not Path(archive).exists()
    assert "docker save k8scifar:7 | ssh NODE sudo k3s ctr images import -" in done.stdout


def test_source_label_carries_no_secret(monkeypatch):
    monkeypatch.delenv("SOURCE", raising=False)
    monkeypatch.setattr(image, "git", lambda *_: "https://someone:secret@example.test/me/k8scifar.git?key=1")
    assert image.source() == "https://example.test/me/k8scifar.git"
    monkeypatch.setattr(image, "git", lambda *_: "/srv/git/k8scifar")
    assert image.source() == ""


def test_wheels_are_laid_for_the_build_alone(tmp_path, monkeypatch):
    (tmp_path / "torch-9.9-py3-none-any.whl").write_text("wheel")
    monkeypatch.setenv("WHEELS", str(tmp_path))
    laid = IMAGE / "wheels/torch-9.9-py3-none-any.whl"
    with image.wheels_at_hand():
        assert laid.read_text() == "wheel"
    assert not laid.exists()
    monkeypatch.setenv("WHEELS", str(tmp_path / "none"))
    with pytest.raises(image.ImageError, match="has no wheels"), image.wheels_at_hand():
        pass


# --- the lock and the context


def locked(name: str = "requirements.lock") -> dict[str, str]:
    lines = (IMAGE / name).read_text().splitlines()
    assert lines and all(re.fullmatch(r"[a-z0-9.-]+==[A-Za-z0-9.]+", line) for line in lines), lines
    return dict(line.split("==") for line in lines)


@pytest.mark.skipif(tomllib is None, reason="tomllib is in Python 3.11 and newer")
def test_lock_satisfies_the_project():
    project = tomllib.loads((ROOT / "trainer/pyproject.toml").read_text())["project"]
    constraints = (ROOT / "trainer/constraints.txt").read_text().splitlines()
    wanted = [Requirement(line) for line in project["dependencies"] + [c for c in constraints if c[:1].isalpha()]]
    assert len(wanted) > len(project["dependencies"]) > 5
    for requirement in wanted:
        version = locked().get(requirement.name.lower())
        assert version, f"{requirement.name} is not in the lock: make image-lock"
        assert requirement.specifier.contains(version), f"{requirement} but {version} in the lock: make image-lock"


def test_cuda_lock_adds_to_the_common_one():
    common, cuda = locked(), locked("requirements-cuda.lock")
    assert not set(common) & set(cuda)
    assert "triton" in cuda and any(name.startswith("nvidia-cudnn") for name in cuda)
    assert not [name for name in common if name.startswith("nvidia")]


def test_remote_lock_adds_what_s3_needs():
    common, remote = locked(), locked("requirements-remote.lock")
    assert not set(common) & set(remote)
    assert {"s3fs", "aiobotocore", "aiohttp"} <= set(remote)
    assert not [name for name in remote if name.startswith(("nvidia", "cuda", "torch"))]


def test_cuda_takes_no_wheels_that_pip_knows_of(tmp_path, monkeypatch):
    (tmp_path / "torch-9.9+cpu-py3-none-any.whl").write_text("wheel")
    monkeypatch.delenv("WHEELS", raising=False)
    monkeypatch.setattr("engine.run", lambda command: subprocess.CompletedProcess(command, 0, f"{tmp_path}\n", ""))
    assert image.wheel_folder() == tmp_path
    monkeypatch.setenv("VARIANT", "cuda")
    assert image.wheel_folder() is None


def test_context_lets_through_what_the_dockerfile_copies():
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", (IMAGE / "Dockerfile").read_text(), re.M)
    assert copied
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for path in " ".join(copied).split():
        assert (ROOT / path).exists(), path
        assert any(path == entry or path.startswith(f"{entry}/") for entry in allowed), path


# --- the pruning


def test_pruning_keeps_what_runs(tmp_path):
    site = tmp_path / "lib/python3.11/site-packages"
    kept = [
        "numpy/core.py",
        "numpy/testing/__init__.py",
        "numpy-1.dist-info/licenses/LICENSE",
        "triton/backends/cuda.h",
    ]
    gone = ["numpy/tests/test_core.py", "numpy/core.pyi", "torch/test/run", "torch/include/a.h", "setuptools/x.py"]
    for name in kept + gone:
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_text("value = 1\n")
    command = [sys.executable, str(IMAGE / "build" / "prune.py"), str(tmp_path), "--epoch", "1000"]
    done = subprocess.run(command, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert [name for name in kept if not (site / name).exists()] == []
    assert [name for name in gone if (site / name).exists()] == []
    caches = list(site.rglob("*.pyc"))
    assert len(caches) == 2
    # Flags 1: checked against no source, so that the time stamp does not matter.
    assert all(int.from_bytes(cache.read_bytes()[4:8], "little") == 1 for cache in caches)
    assert {path.stat().st_mtime for path in tmp_path.rglob("*")} == {1000}


def test_pruning_refuses_what_is_no_environment(tmp_path):
    command = [sys.executable, str(IMAGE / "build" / "prune.py"), str(tmp_path)]
    done = subprocess.run(command, text=True, capture_output=True)
    assert done.returncode == 1 and "is not an environment" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "text",
    ["2026-01-31T12:00:00.5Z", "2026-01-31T12:00:00.500000000+00:00", "2026-01-31 12:00:00.5 +0000 UTC",
     "2026-01-31T13:00:00.500000000+01:00"],
)  # fmt: skip
def test_times_of_engines(text):
    assert smoke.moment(text) == pytest.approx(1769860800.5, abs=1e-6)
