"""The release that `make scaling` measures with: the user's values, ours laid over them, and Helm's commands for it."""

from __future__ import annotations

import hashlib
import subprocess
from dataclasses import dataclass
from typing import Any

import helm as helm_finder
import yaml  # of .venv, which the task builds: Helm prints no JSON
from kube import ROOT, ToolError
from kube_objects import note

MARK = "scaling"  # annotation k8scifar/scaling of the workload: the series that it is measured for
NO_SERIES = "none"  # in what is rendered only to be looked at
OVER_YOURS = "as a StatefulSet whose pods stay, without TensorBoard, without checkpoints in the middle, never elastic"


@dataclass(frozen=True)
class Chart:
    """The chart with one user's values, for measuring; `options` are the user's for Helm."""

    release: str
    namespace: str
    context: str
    options: tuple[str, ...]
    epochs: int

    def run_name(self, nodes: int, series: str) -> str:
        """Name of the run on so many nodes."""
        return f"scaling-{nodes}-{series}"

    def own(self, nodes: int, series: str) -> list[str]:
        """Helm's options that come after the user's."""
        return [
            f"--set=nodes={nodes},train.name={self.run_name(nodes, series)},train.epochs={self.epochs}",
            # A training that was disturbed begins its epoch anew: its speed is that of a whole epoch in any case.
            "--set=train.checkpoint.every_steps=0,train.checkpoint.every_seconds=0,train.evaluation.tta=false",
            "--set=tensorboard.enabled=false,tensorboard.ingress.enabled=false,elastic.enabled=false,elastic.minNodes=1",
            "--set=workload.kind=StatefulSet,completion.policy=hold,fullnameOverride=",
            f"--set-string=workload.annotations.k8scifar/{MARK}={series}",
        ]

    def rendered(self, nodes: int, ours: bool = True) -> list[dict[str, Any]]:
        """The objects for so many nodes, with our values or without. Raises ToolError: Helm's own sentence."""
        more = self.own(nodes, NO_SERIES) if ours else [f"--set=nodes={nodes}"]
        done = self._helm("template", self.release, str(ROOT / "chart"), *self.options, *more)
        if done.returncode:
            raise ToolError(f"nodes={nodes}: {sentence(done.stderr)}")
        objects = [item for item in yaml.load_all(done.stdout, getattr(yaml, "CSafeLoader", yaml.SafeLoader)) if item]
        found = workload(objects)
        name = note(found, "run-dir").rpartition("/")[2]
        if ours and (found["spec"]["replicas"], name) != (nodes, self.run_name(nodes, NO_SERIES)):
            raise ToolError("HELM_ARGS overrules nodes or train.name (--set-string, --set-file): leave them out")
        return objects

    def key(self, context: str) -> str:
        """Digest of all that a measurement depends on but the number of nodes: the objects and kubectl's context."""
        return hashlib.sha256(repr((context, self.rendered(1))).encode()).hexdigest()[:16]

    def series(self) -> str | None:
        """The series that the release is installed for, None where there is none. Raises ToolError: it is not ours."""
        done = self._helm("get", "values", self.release, "--output=json")
        if done.returncode:
            if "not found" in done.stderr:
                return None
            raise ToolError(sentence(done.stderr))
        given = yaml.safe_load(done.stdout) or {}
        annotations = (given.get("workload") or {}).get("annotations") or {}
        if f"k8scifar/{MARK}" not in annotations:
            raise ToolError(
                f"release {self.release} in namespace {self.namespace} is not one that make scaling installed: choose "
                "another RELEASE=..., whose measurement is named RELEASE-scaling, or uninstall that one"
            )
        return annotations[f"k8scifar/{MARK}"]

    def install(self, nodes: int, series: str) -> None:
        """Install or upgrade for so many nodes. Raises ToolError."""
        more = [*self.options, *self.own(nodes, series)]
        done = self._helm("upgrade", "--install", self.release, str(ROOT / "chart"), *more)
        if done.returncode:
            raise ToolError(
                f"nodes={nodes}: Helm could not install {self.release}: {sentence(done.stderr)}; once that is mended, "
                "the same command goes on"
            )

    def uninstall(self) -> None:
        """Uninstall. Raises ToolError."""
        done = self._helm("uninstall", self.release)
        if done.returncode:
            raise ToolError(f"Helm could not uninstall {self.release}: {sentence(done.stderr)}")

    def _helm(self, *words: str) -> subprocess.CompletedProcess[str]:
        try:
            found = str(helm_finder.find())
        except LookupError as error:
            raise ToolError(str(error)) from None
        context = [f"--kube-context={self.context}"] if self.context else []
        # In a session of its own: Ctrl-C would leave a release that is half made.
        command = [found, *words, f"--namespace={self.namespace}", *context]
        return subprocess.run(command, capture_output=True, text=True, errors="replace", start_new_session=True)


def workload(objects: list[dict[str, Any]]) -> dict[str, Any]:
    """The StatefulSet or Job among rendered objects."""
    return next(item for item in objects if item["kind"] in ("StatefulSet", "Job"))


def sentence(said: str) -> str:
    """What Helm says, in one line: of the chart's own refusals the refusal alone."""
    paragraphs = [" ".join(part.split()) for part in said.split("\n\n")]
    told = [part for part in paragraphs if part and not part.startswith("Use --debug")]
    chosen = told[1:] if len(told) > 1 and told[0].startswith("Error: execution error at") else told
    return " ".join(chosen).removeprefix("Error: ") or "no reason given"
