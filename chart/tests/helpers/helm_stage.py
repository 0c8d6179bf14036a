"""In place of Helm where it needs a cluster: renders with the real one, and shows kubectl's stand-in the objects."""

from __future__ import annotations

import copy
import functools
import json
import re
import subprocess
from collections.abc import Callable
from typing import Any

import yaml
from chart_helpers import LOADER, helm
from cluster_stage import RUNNING, Stage, installed, pod
from scaling_chart import NO_SERIES

ANNOTATION = "k8scifar/scaling"


@functools.cache
def template(*words: str) -> subprocess.CompletedProcess[str]:
    """`helm template`, once for the same words."""
    return subprocess.run([helm(), *words], capture_output=True, text=True, timeout=60)


class Helm:
    """A cluster in which each installed training is done at once, unless a test says otherwise."""

    def __init__(self, stage: Stage) -> None:
        self.stage, self.calls = stage, []
        self.series: str | None = None  # of the release that is installed; empty: somebody else's
        self.rates = {1: 115.0, 2: 207.0, 3: 290.0}  # images/s by nodes; none: that training does not end
        self.states: dict[int, tuple[dict[str, Any], str]] = {}  # nodes -> the last pod's state, and container
        self.refusal = ""
        self.real: Callable[..., subprocess.CompletedProcess[str]] | None = None  # for a server that `items` are of
        self.items: Callable[[], list[dict[str, Any]]] = list
        self.during: Callable[[int], None] = lambda nodes: None  # after an installation

    def __call__(self, *words: str, kubectl: Any, fetch: bool = True) -> subprocess.CompletedProcess[str]:
        """As the tools call helm.run."""
        self.calls.append(list(words))
        if self.real and words[0] != "template":
            done = self.real(*words, kubectl=kubectl)
            if words[0] == "upgrade" and not done.returncode:
                self.install(self.items())
            elif words[0] == "uninstall":
                self.stage.objects(self.items())
            return done
        if words[0] == "template":
            return template(*words, f"--namespace={kubectl.namespace}")
        if words[0] == "get":
            given = {"workload": {"annotations": {ANNOTATION: self.series}}} if self.series else None
            return self.ended(json.dumps(given)) if self.series is not None else self.ended("", "release: not found")
        if words[0] == "upgrade" and self.refusal:
            return self.ended("", self.refusal)
        if words[0] == "upgrade":
            series = words[-1].rpartition("=")[2]
            same = [word.replace(series, NO_SERIES) for word in words[2:]]  # as it was rendered before
            text = template("template", *same, f"--namespace={kubectl.namespace}").stdout
            text = re.sub(rf"(scaling-\d+-|{ANNOTATION}: ){NO_SERIES}\b", rf"\g<1>{series}", text)
            self.install([item for item in yaml.load_all(text, LOADER) if item])
        if words[0] == "uninstall":
            self.series = None
            kept = json.loads((self.stage.home / "objects.json").read_text())["items"]
            self.stage.objects([item for item in kept if item["kind"] == "PersistentVolumeClaim"])
        return self.ended("")

    def ended(self, said: str, error: str = "") -> subprocess.CompletedProcess[str]:
        """What a command came to."""
        return subprocess.CompletedProcess([], bool(error), said, f"Error: {error}\n" if error else "")

    def install(self, objects: list[dict[str, Any]]) -> None:
        """The objects, their pods, and what the training leaves."""
        workload = next(item for item in objects if item["kind"] == "StatefulSet")
        nodes, notes = workload["spec"]["replicas"], workload["metadata"]["annotations"]
        self.series = notes[ANNOTATION]
        name = workload["metadata"]["name"]
        pods = [pod(objects, f"{name}-{ordinal}", "trainer", RUNNING) for ordinal in range(nodes)]
        for ordinal, item in enumerate(pods):
            item["spec"]["nodeName"] = f"node-{'abc'[ordinal]}"
        if nodes in self.states:
            state, at = self.states[nodes]
            pods[-1] = pod(objects, f"{name}-{nodes - 1}", "trainer", copy.deepcopy(state), at)
        self.stage.objects(installed(objects, *pods))
        if nodes in self.rates:
            self.finish(notes["k8scifar/run-dir"], nodes)
        self.during(nodes)

    def finish(self, run_dir: str, nodes: int) -> None:
        """The run folder of a training that is done."""
        folder = self.stage.home / run_dir.lstrip("/")
        folder.mkdir(parents=True)
        rate = self.rates[nodes]
        records = [{"epoch": 1, "images_per_second": rate / 2}, {"epoch": 2, "images_per_second": rate}]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        summary = {
            "epochs": 2,
            "world_size": nodes,
            "global_batch": 250,
            "device": "cpu, 2 thread(s)",
            "versions": {"torch": "2.13.0"},
            "identity": {"distributed.comm": "auto" if nodes == 1 else "bf16"},
        }
        alone = {"pixels": 16, "alone": [115.0, 98.0, 100.0][:nodes], "together": rate, "network": 0.04}
        (folder / "summary.json").write_text(json.dumps(summary | ({"machines": alone} if nodes > 1 else {})))
