"""The release that `make scaling` measures: the user's values under those that measuring needs."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import helm
import yaml  # of .venv, which make builds: `helm template` prints no JSON
from kube import CHART, Kubectl, ToolError
from kube_objects import note

MARK = "k8scifar/scaling"  # annotation of the workload: the series that it is measured for
NO_SERIES = "none"  # the mark of objects that are rendered and not installed
OVERRIDES = "as a StatefulSet whose pods stay, without TensorBoard, without checkpoints in the middle, never elastic"


@dataclass(frozen=True)
class Chart:
    """The chart with a user's options for Helm."""

    release: str
    kubectl: Kubectl
    options: tuple[str, ...]
    epochs: int

    def run_name(self, nodes: int, series: str) -> str:
        """The name of the run on so many nodes."""
        return f"scaling-{nodes}-{series}"

    def all_options(self, nodes: int, series: str) -> list[str]:
        """The user's options and, after them, those for measuring."""
        return [
            *self.options,
            f"--set=nodes={nodes},train.name={self.run_name(nodes, series)},train.epochs={self.epochs}",
            # Without checkpoints in the middle, a training that was disturbed measures a whole epoch again.
            "--set=train.checkpoint.every_steps=0,train.checkpoint.every_seconds=0,train.evaluation.tta=false",
            "--set=tensorboard.enabled=false,tensorboard.ingress.enabled=false,elastic.enabled=false,elastic.minNodes=1",
            "--set=workload.kind=StatefulSet,completion.policy=hold,fullnameOverride=",
            f"--set-string=workload.annotations.{MARK}={series}",
        ]

    def rendered(self, nodes: int) -> list[dict[str, Any]]:
        """The objects for so many nodes. Raises ToolError with Helm's message."""
        text = self._helm(f"nodes={nodes}", "template", self.release, CHART, *self.all_options(nodes, NO_SERIES))
        objects = [item for item in yaml.load_all(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader)) if item]
        found = stateful_set(objects)
        run = note(found, "run-dir").rpartition("/")[2]
        if (found["spec"]["replicas"], run) != (nodes, self.run_name(nodes, NO_SERIES)):
            raise ToolError("HELM_ARGS overrules nodes or train.name (--set-string, --set-file): leave them out")
        return objects

    def digest(self) -> str:
        """A digest of everything that a measurement depends on except the number of nodes."""
        context = self.kubectl.context or self.kubectl.run("config", "current-context").stdout.strip()
        return hashlib.sha256(repr((context, self.rendered(1))).encode()).hexdigest()[:16]

    def series(self) -> str | None:
        """The series that the release is installed for, None if it is not installed.

        Raises ToolError if `make scaling` did not install it.
        """
        try:
            given = json.loads(self._helm("", "get", "values", self.release, "--output=json")) or {}
        except ToolError as error:
            if "not found" in str(error):
                return None
            raise
        annotations = (given.get("workload") or {}).get("annotations") or {}
        if MARK not in annotations:
            raise ToolError(
                f"make scaling did not install release {self.release} in namespace {self.kubectl.namespace}: choose "
                "another RELEASE=..., whose measurement is named RELEASE-scaling, or uninstall that one"
            )
        return annotations[MARK]

    def install(self, nodes: int, series: str) -> None:
        """Install or upgrade the release. Raises ToolError."""
        failed = f"nodes={nodes}: Helm could not install {self.release}"
        try:
            self._helm(failed, "upgrade", "--install", self.release, CHART, *self.all_options(nodes, series))
        except ToolError as error:
            raise ToolError(f"{error}; once that is mended, the same command goes on") from None

    def uninstall(self) -> None:
        """Uninstall the release. Raises ToolError."""
        self._helm(f"Helm could not uninstall {self.release}", "uninstall", self.release)

    def _helm(self, failed: str, *words: str) -> str:
        """What Helm prints. Raises ToolError: what failed, and Helm's message."""
        done = helm.run(*words, kubectl=self.kubectl)
        if done.returncode:
            raise ToolError(f"{failed}: {message(done.stderr)}".removeprefix(": "))
        return done.stdout


def stateful_set(objects: list[dict[str, Any]]) -> dict[str, Any]:
    """The StatefulSet among rendered objects."""
    return next(item for item in objects if item["kind"] == "StatefulSet")


def message(text: str) -> str:
    """Helm's error in one line; of the chart's refusals only the sentence."""
    paragraphs = [" ".join(part.split()) for part in text.split("\n\n")]
    kept = [part for part in paragraphs if part and not part.startswith("Use --debug")]
    if len(kept) > 1 and kept[0].startswith("Error: execution error at"):
        kept = kept[1:]
    return " ".join(kept).removeprefix("Error: ") or "no reason given"
