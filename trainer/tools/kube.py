"""kubectl, and what it says of a release of the chart; for the tools beside it. Python's standard library only."""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
MOUNT = "/volumes/checkpoints"
KINDS = "statefulsets,jobs,deployments,pods,persistentvolumeclaims,services"
UNREACHABLE = re.compile(
    r"connection refused|was refused|unable to connect|no such host|i/o timeout|timed out|deadline exceeded|"
    r"no route to host|context .* does not exist|current-context is not set|handshake|certificate|no configuration",
    re.I,
)


class ToolError(Exception):
    """One line that says what is wrong and what to do; exit code 2."""


@dataclass(frozen=True)
class Kubectl:
    """kubectl for one namespace of one cluster."""

    namespace: str
    context: str = ""

    def command(self, *arguments: str) -> list[str]:
        """The command line of kubectl with these arguments."""
        if not shutil.which("kubectl"):
            raise ToolError("kubectl is not on PATH; install it, and point it at your cluster")
        context = [f"--context={self.context}"] if self.context else []
        return ["kubectl", *context, f"--namespace={self.namespace}", *arguments]

    def run(self, *arguments: str, given: str | None = None, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        """Run kubectl to its end, its output captured as text."""
        command = self.command(*arguments)
        try:
            return subprocess.run(
                command, input=given, text=True, capture_output=True, errors="replace", timeout=timeout
            )
        except subprocess.TimeoutExpired:
            return subprocess.CompletedProcess(command, 124, "", f"no answer within {timeout:.0f} s: timed out")

    def ask(self, *arguments: str, given: str | None = None) -> str:
        """What kubectl prints. Raises ToolError where it fails, in kubectl's own last words."""
        done = self.run(*arguments, "--request-timeout=20s", given=given)
        if done.returncode == 0:
            return done.stdout
        words = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        if UNREACHABLE.search(done.stderr):
            raise ToolError(f"no cluster answers ({words}); look at `kubectl config get-contexts`, or start it")
        raise ToolError(f"kubectl {arguments[0]}: {words}")


@dataclass
class Release:
    """The objects of an installed release, and those that outlive it."""

    name: str
    kubectl: Kubectl
    objects: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    @classmethod
    def find(cls, name: str, kubectl: Kubectl) -> Release:
        """Ask the cluster. Raises ToolError where there is no cluster, or nothing of such a release."""
        answer = kubectl.ask("get", KINDS, f"--selector=app.kubernetes.io/instance={name}", "--output=json")
        release = cls(name, kubectl)
        for item in json.loads(answer)["items"]:
            release.objects.setdefault(item["kind"], []).append(item)
        if not release.objects:
            raise ToolError(
                f"there is no release {name} in namespace {kubectl.namespace}; install it (make install), or say "
                "which: RELEASE=... NAMESPACE=..."
            )
        return release

    @property
    def workload(self) -> dict[str, Any] | None:
        """The StatefulSet or the newest Job; None where the release is gone."""
        found = self.objects.get("StatefulSet", []) or self.objects.get("Job", [])
        return max(found, key=lambda item: item["metadata"].get("creationTimestamp", ""), default=None)

    def pods(self, component: str = "") -> list[dict[str, Any]]:
        """Its pods of a component (all: empty), by name."""
        found = [pod for pod in self.objects.get("Pod", []) if component in ("", label(pod, "component"))]
        return sorted(found, key=lambda pod: pod["metadata"]["name"])

    def carriers(self) -> list[dict[str, Any]]:
        """What may carry the chart's notes on the run, most trusted first."""
        claims = self.objects.get("PersistentVolumeClaim", [])
        claims = [claim for claim in claims if label(claim, "component") == "checkpoints"]
        return [item for item in [self.workload, *self.objects.get("Deployment", []), *claims] if item]

    def run_dir(self, needed: bool = True) -> str:
        """The run folder as the pods see it. Where it is not known, raises ToolError, or is empty if not `needed`."""
        for item in self.carriers():
            if found := item["metadata"].get("annotations", {}).get("k8scifar/run-dir"):
                return found
        if not needed:
            return ""
        raise ToolError(f"release {self.name} does not say where its run is: say it with RUN_DIR={MOUNT}/runs/NAME")

    def reader(self) -> tuple[str, str] | None:
        """A running pod, and its container, that has the checkpoints' volume; TensorBoard's before the trainers'."""
        for component in ("tensorboard", "trainer"):
            for pod in self.pods(component):
                if any(status["name"] == component and "running" in status["state"] for status in statuses(pod)):
                    return pod["metadata"]["name"], component
        return None


def label(item: dict[str, Any], name: str) -> str:
    """One of the recommended labels."""
    return item["metadata"].get("labels", {}).get(f"app.kubernetes.io/{name}", "")


def statuses(pod: dict[str, Any]) -> list[dict[str, Any]]:
    """The states of its containers, those that initialise it first."""
    status = pod.get("status", {})
    return [*status.get("initContainerStatuses", []), *status.get("containerStatuses", [])]


def standing(pod: dict[str, Any]) -> tuple[str, str]:
    """The container a pod is at, and how it stands, in words."""
    for status in statuses(pod):
        state = status.get("state", {})
        ended = state.get("terminated") or status.get("lastState", {}).get("terminated") or {}
        why = " ".join(ended.get("message", "").split()[-60:])
        if "waiting" in state and state["waiting"].get("reason") != "PodInitializing":
            words = state["waiting"].get("reason") or "waiting"
            return status["name"], f"{words}: {why or state['waiting'].get('message', '')}".rstrip(": ")
        if "running" in state:
            restarts = f", restarted {status['restartCount']} times" if status.get("restartCount") else ""
            return status["name"], f"running{restarts}"
        if "terminated" in state and state["terminated"].get("exitCode"):
            return status["name"], f"ended with exit code {state['terminated']['exitCode']}: {why}".rstrip(": ")
    last = statuses(pod)[-1:]
    if last and "terminated" in last[0].get("state", {}):
        return last[0]["name"], "done"
    conditions = pod.get("status", {}).get("conditions", [])
    unfit = next((each for each in conditions if each["type"] == "PodScheduled" and each["status"] == "False"), None)
    if unfit:
        return "", f"not scheduled: {unfit.get('message', unfit.get('reason', ''))}"
    return "", pod.get("status", {}).get("phase", "unknown").lower()


def arguments(description: str) -> argparse.ArgumentParser:
    """A parser with the options that every tool takes."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--release", default="cifar")
    parser.add_argument("--namespace", default="default")
    parser.add_argument("--context", default="", help="kubectl's context; default: the current one")
    return parser


def exit_code(action: Callable[[], int | None]) -> int:
    """Run a tool; a ToolError is one line and exit code 2."""
    try:
        return action() or 0
    except ToolError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
