"""The real image: built by a real engine, run as the pods will run it, and looked into."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TAG = f"test-{os.getpid()}"
NAME = f"k8scifar:{TAG}"
BUDGET = 1.0e9

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(1200)]


def why_no_engine() -> str | None:
    """Why no engine can run here; None: one can."""
    if shutil.which("docker") and subprocess.run(["docker", "info"], capture_output=True).returncode == 0:
        return None
    if os.geteuid() != 0:
        return "no container engine answers, and only root can start one"
    if shutil.which("dockerd") and shutil.which("mmdebstrap"):
        return None
    if not shutil.which("apt-get"):
        return "no container engine, and no apt-get to install one with"
    return None if os.environ.get("K8SCIFAR_INSTALL") else "no container engine; K8SCIFAR_INSTALL=1 installs docker.io"


@pytest.fixture(scope="module")
def engine() -> Iterator[dict[str, str]]:
    """The environment in which docker answers: a running engine, or one started for these tests alone."""
    if reason := why_no_engine():
        pytest.skip(reason)
    holder = subprocess.Popen(
        [str(ROOT / "image/tools/with-engine.sh"), "sh", "-c", 'echo "host $DOCKER_HOST"; cat'],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    first = holder.stdout.readline().split()
    if not first:
        pytest.skip(f"no container engine can run here: image/tools/with-engine.sh exited with {holder.wait()}")
    host = {"DOCKER_HOST": first[1]} if len(first) > 1 else {}
    yield os.environ | host | {"ENGINE": "docker", "TAG": TAG}
    if not host:  # someone's own engine: leave it as it was
        subprocess.run(["docker", "rmi", "--force", NAME], capture_output=True)
    holder.stdin.close()
    assert holder.wait(240) == 0  # it removes gigabytes


@pytest.fixture(scope="module")
def built(engine: dict[str, str]) -> dict[str, str]:
    """The engine, with the image in it; where no base image can be pulled, one is made from Debian's packages."""
    if os.geteuid() == 0 and (shutil.which("mmdebstrap") or shutil.which("apt-get")):
        started = time.monotonic()
        subprocess.run([str(ROOT / "image/tools/base.sh"), "k8scifar-base:test"], env=engine, check=True)
        print(f"base image in {time.monotonic() - started:.0f} s")
        engine["BASE"] = "k8scifar-base:test"
    done = subprocess.run(["make", "image"], cwd=ROOT, env=engine, text=True, capture_output=True)
    print(done.stdout[-1500:], done.stderr[-1500:])
    assert done.returncode == 0
    return engine


def docker(built: dict[str, str], *arguments: str) -> str:
    done = subprocess.run(["docker", *arguments], env=built, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def inside(built: dict[str, str], script: str) -> str:
    """Run Python in the image, locked as a pod's container."""
    locked = ("--rm", "--read-only", "--cap-drop=ALL", "--network=none", "--tmpfs=/tmp")
    return docker(built, "run", *locked, "--entrypoint=python", NAME, "-c", script)


def test_two_containers_train_and_stop(built):
    """`make image-smoke`: DDP between two locked containers to the end, TensorBoard, and SIGTERM in the middle."""
    done = subprocess.run(["make", "image-smoke"], cwd=ROOT, env=built, text=True, capture_output=True)
    print(done.stdout, done.stderr)
    assert done.returncode == 0 and "smoke run passed" in done.stdout
    assert "two ranks trained together" in done.stdout and "with exit code 3" in done.stdout
    left = docker(built, "ps", "--all", "--quiet", "--filter=name=k8scifar-smoke")
    left += docker(built, "volume", "ls", "--quiet", "--filter=name=k8scifar-smoke")
    assert left + docker(built, "network", "ls", "--quiet", "--filter=name=k8scifar-smoke") == ""


def test_size_and_settings(built):
    facts = json.loads(docker(built, "image", "inspect", NAME))[0]
    print(f"{facts['Size'] / 1e6:.0f} MB unpacked")
    print(docker(built, "history", "--format={{.Size}} {{.CreatedBy}}", NAME))
    assert facts["Size"] <= BUDGET
    config = facts["Config"]
    assert config["User"] == "1000:1000" and config["Entrypoint"] == ["tini", "--", "k8scifar"]
    labels = {key.removeprefix("org.opencontainers.image."): value for key, value in config["Labels"].items()}
    assert labels["title"] == "k8scifar" and labels["licenses"] == "MIT"
    assert re.fullmatch(r"\d+\.\d+\.\d+", labels["version"])
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?", labels["revision"])
    assert "@" not in labels["source"]


def test_nothing_needless_inside(built):
    script = """
import json, os, shutil, sys
site = next(path for path in sys.path if path.endswith("site-packages"))
tests = [root for root, folders, files in os.walk(site) if root.endswith(("/tests", "torch/test"))]
places = ("/root/.cache", "/tmp/.cache", "/var/lib/apt/lists", "/var/cache/apt/archives")
caches = [os.path.join(root, file) for place in places for root, folders, files in os.walk(place) for file in files
          if os.path.getsize(os.path.join(root, file))]
tools = [tool for tool in ("gcc", "cc", "g++", "clang", "make", "pip", "uv", "strip") if shutil.which(tool)]
needless = [name for name in ("pip", "setuptools", "pytest", "uv") if os.path.exists(f"{site}/{name}")]
print(json.dumps(tests + caches + tools + needless))
"""
    assert json.loads(inside(built, script)) == []


def test_a_shell_for_probes(built):
    options = ("--rm", "--read-only", "--entrypoint=sh")
    script = "for tool in test stat date cat find; do command -v $tool; done"
    assert len(docker(built, "run", *options, NAME, "-c", script).splitlines()) == 5


def test_bytecode_is_settled(built):
    """What training imports has its bytecode in the image, the standard library's included."""
    script = """
import json, os, pkgutil, sys, importlib
import k8scifar
for found in pkgutil.walk_packages(k8scifar.__path__, "k8scifar."):
    if not found.name.endswith("__main__"):
        importlib.import_module(found.name)
modules = [m for m in list(sys.modules.values()) if isinstance(getattr(m, "__cached__", None), str)]
missing = [m.__name__ for m in modules if not os.path.exists(m.__cached__)]
print(json.dumps([len(modules), missing]))
"""
    loaded, missing = json.loads(inside(built, script))
    assert loaded > 1000
    assert len(missing) <= loaded // 100, missing


def test_packages_fit_together(built):
    """Every requirement of every package is there in a version that it allows, as the lock has it."""
    script = """
import importlib.metadata as metadata, json
from packaging.requirements import Requirement
versions = {d.metadata["Name"].lower().replace("_", "-"): d.version for d in metadata.distributions()}
faults = []
for distribution in metadata.distributions():
    for text in distribution.requires or []:
        need = Requirement(text)
        if need.marker and not need.marker.evaluate({"extra": ""}):
            continue
        have = versions.get(need.name.lower().replace("_", "-"))
        if have is None or not need.specifier.contains(have, prereleases=True):
            faults.append(f"{distribution.metadata['Name']}: {text}, have {have}")
print(json.dumps([versions, faults]))
"""
    versions, faults = json.loads(inside(built, script))
    pruned = ("setuptools", "tzdata")  # named by packages that use them only to build, or only without the system's
    assert [fault for fault in faults if not fault.split(": ")[1].startswith(pruned)] == []
    lock = dict(line.split("==") for line in (ROOT / "image/requirements.lock").read_text().splitlines())
    installed = {name: version.partition("+")[0] for name, version in versions.items() if name != "k8scifar"}
    assert {**installed, **{name: lock[name] for name in pruned}} == lock


def test_shared_libraries_load(built):
    """Stripping and pruning broke no shared library."""
    script = """
import ctypes, json, os, pathlib, sys, torch
site = next(path for path in sys.path if path.endswith("site-packages"))
faults, loaded = [], 0
for path in sorted(pathlib.Path(site).rglob("*.so*")):
    try:
        ctypes.CDLL(str(path))
        loaded += 1
    except OSError as error:
        faults.append(f"{path.relative_to(site)}: {error}")
print(json.dumps([loaded, faults]), flush=True)
os._exit(0)  # so many libraries at once do not end well
"""
    loaded, faults = json.loads(inside(built, script))
    assert loaded > 60
    # torchvision's own operators need a torch of the same build; k8scifar does without them.
    missing = "cannot open shared object file"
    assert [fault for fault in faults if not (fault.startswith("torchvision/") and missing in fault)] == []


def test_a_changed_source_file_rebuilds_in_seconds(built, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".venv", ".git", "data", "runs", "dist", "__pycache__"))
    with (copy / "trainer/src/k8scifar/__init__.py").open("a") as file:
        file.write("\nCHANGED = True\n")
    environment = built | {"TAG": f"{TAG}-changed"}
    started = time.monotonic()
    done = subprocess.run(["make", "image"], cwd=copy, env=environment, text=True, capture_output=True)
    seconds = time.monotonic() - started
    assert done.returncode == 0, done.stdout + done.stderr
    print(f"rebuilt in {seconds:.1f} s")
    changed = f"{NAME}-changed"
    script = "import k8scifar; print(k8scifar.CHANGED)"
    assert docker(built, "run", "--rm", "--entrypoint=python", changed, "-c", script).strip() == "True"
    docker(built, "rmi", "--force", changed)
    assert seconds < 45  # it takes about 5; the rest is for machines that do other things too


def test_unknown_variant_is_refused_by_the_dockerfile_too(built):
    command = ["docker", "build", "--file=image/Dockerfile", "--build-arg=VARIANT=rocm", "."]
    command.insert(2, f"--build-arg=BASE={built['BASE']}" if "BASE" in built else "--quiet")
    done = subprocess.run(command, cwd=ROOT, env=built | {"DOCKER_BUILDKIT": "0"}, text=True, capture_output=True)
    assert done.returncode != 0 and "error: unknown VARIANT 'rocm': cpu or cuda" in done.stdout + done.stderr
