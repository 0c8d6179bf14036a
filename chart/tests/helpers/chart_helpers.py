"""Rendering the chart with real Helm, for the chart's tests."""

from __future__ import annotations

import functools
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[3]
CHART, VALUES = ROOT / "chart", ROOT / "values"
sys.path.insert(0, str(ROOT / "chart" / "tools"))
SERVER = "--set=nfs.server=192.0.2.1"
FILES = sorted(path.name for path in VALUES.glob("*.yaml"))
NFS = ("two-node.yaml", SERVER)
LOCAL = ("local.yaml",)
# Ten times as fast, if it is installed.
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@functools.cache
def helm(major: int = 4) -> str:
    """Path of a Helm binary; skips the test if there is none."""
    import helm as finder

    try:
        return str(finder.find(major))
    except LookupError as error:
        pytest.skip(str(error))


def layers(name: str) -> tuple[str, ...]:
    """The options that a file in values/ needs, as its first lines show."""
    if re.search("hostPath|^local:", (VALUES / name).read_text(), re.MULTILINE):
        return (name,)
    return (*NFS, name) if name != NFS[0] else NFS


@functools.lru_cache(1000)
def run(
    *options: str, major: int = 4, verb: str = "template", release: str = "cifar", chart: Path = CHART
) -> subprocess.CompletedProcess[str]:
    """`helm template` (or another verb) with options, of which a plain name is a file in values/."""
    name = (release,) if verb in ("template", "install") else ()
    arguments = [
        item for option in options for item in (("-f", str(VALUES / option)) if option in FILES else (option,))
    ]
    return subprocess.run(
        [helm(major), verb, *name, str(chart), *arguments], capture_output=True, text=True, check=False, timeout=120
    )


def render(*options: str, **choices: Any) -> list[dict]:
    """The objects that Helm renders; fails the test if it refuses."""
    done = run(*options, **choices)
    assert done.returncode == 0, done.stderr
    return [item for item in yaml.load_all(done.stdout, LOADER) if item]


def refused(*options: str, major: int = 4) -> str:
    """Helm's message when it refuses; fails the test if it does not."""
    done = run(*options, major=major)
    assert done.returncode != 0, "Helm rendered what it should refuse"
    return done.stderr


def one(objects: list[dict], kind: str, name: str | None = None) -> dict:
    """The only object of a kind (and name)."""
    found = [item for item in objects if item["kind"] == kind and name in (None, item["metadata"]["name"])]
    assert len(found) == 1, f"{len(found)} objects of kind {kind} {name or ''}"
    return found[0]


def component(objects: list[dict], kind: str, name: str) -> dict:
    """The only object of a kind with this component's label: dataset, checkpoints, trainer, tensorboard."""
    labels = {"app.kubernetes.io/component": name}.items()
    return one([item for item in objects if labels <= item["metadata"]["labels"].items()], kind)


def pods(objects: list[dict]) -> list[dict]:
    """Every pod's spec."""
    found = []
    for item in objects:
        if item["kind"] in ("StatefulSet", "Job", "Deployment"):
            found.append(item["spec"]["template"]["spec"])
        elif item["kind"] == "Pod":
            found.append(item["spec"])
    return found


def trainer(objects: list[dict]) -> dict:
    """The spec of the training pod."""
    (workload,) = (item for item in objects if item["kind"] in ("StatefulSet", "Job"))
    return workload["spec"]["template"]["spec"]


def container(pod: dict, name: str = "trainer") -> dict:
    """A container, or an init container, by name."""
    (found,) = (item for item in pod["containers"] + pod.get("initContainers", []) if item["name"] == name)
    return found
