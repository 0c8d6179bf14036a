"""Run kubectl and find the objects of a release. The tools import it; Python's standard library only."""

from __future__ import annotations

import argparse
import errno
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kube_objects import answers, label, named, note, statuses
from volumes import claim_of, ordered, run_claim

ROOT = Path(__file__).resolve().parents[2]
CHART = str(ROOT / "chart")
MOUNT = "/volumes/checkpoints"
KINDS = "statefulsets,jobs,deployments,pods,persistentvolumeclaims,services,configmaps"
# kubectl's message when the cluster does not answer, the most specific first -> what it means and what to type.
FAILURES = (
    (
        r"context .*does not exist|context was not found|no context exists",
        "kubectl knows no such context; `kubectl config get-contexts` lists those it knows: CONTEXT=...",
    ),
    (
        r"Unauthorized|must be logged in|provide credentials|getting credentials|token .*expired|oauth2|"
        r"unable to load .*(cert|key)|exec plugin",
        "the cluster does not take your credentials, which may have expired: log in again, or get a new kubeconfig",
    ),
    (
        r"x509|certificate|tls: ",
        "the cluster's certificate is not the one that your kubeconfig expects: get a new kubeconfig, or CONTEXT=...",
    ),
    (
        r"timed out|deadline exceeded|i/o timeout|Client\.Timeout|TLS handshake timeout",
        "the cluster does not answer in time: is it on, and is this machine in its network (VPN)? or CONTEXT=...",
    ),
    (
        r"connection refused|was refused|unable to connect|no such host|no route to host|network is unreachable|"
        r"current-context is not set|no configuration|connection reset|\bEOF\b",
        "no cluster answers: start it, or choose another of `kubectl config get-contexts` by CONTEXT=...",
    ),
)
FORBIDDEN = re.compile(
    r'User "(?P<user>[^"]*)" cannot (?P<verb>\w+) resource "(?P<what>[^"]*)"(?:.* in the namespace "(?P<where>[^"]*)")?'
)


class ToolError(Exception):
    """A mistake of the user's or a fault of the cluster, in one line with what to do; exit code 2."""


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
        """What kubectl prints. Raises ToolError with the reason and kubectl's message."""
        done = self.run(*arguments, "--request-timeout=20s", given=given)
        # The user may see some kinds and not others.
        if done.returncode == 0 or ("forbidden" in done.stderr.lower() and parsed_items(done.stdout)):
            return done.stdout
        raise ToolError(self.why(arguments[0], done.stderr, done.returncode))

    def items(self, *arguments: str) -> list[dict[str, Any]] | None:
        """The objects of `kubectl get`; None if the cluster does not give them to this user."""
        done = self.run("get", *arguments, "--output=json", "--request-timeout=20s", timeout=30)
        return parsed_items(done.stdout) if done.returncode == 0 else None

    def why(self, verb: str, message: str, code: int) -> str:
        """Explain a failure of kubectl in one line."""
        lines = [line.strip() for line in message.splitlines() if line.strip()]
        start = re.compile(r"error|unable to|the connection to|no answer", re.I)
        words = next((line for line in lines if start.match(line)), lines[-1] if lines else f"exit code {code}")
        if found := FORBIDDEN.search(message):
            return (
                f"{found['user']} may not {found['verb']} {found['what']} in namespace {found['where'] or 'any'}: "
                f"another NAMESPACE=..., or ask who runs the cluster for the role; "
                f"`kubectl {self.options()} auth can-i --list` shows what you may do"
            )
        for pattern, meaning in FAILURES:
            if re.search(pattern, words, re.I):
                return f"{meaning} ({words.removeprefix('error: ')})"
        return f"kubectl {verb}: {words.removeprefix('error: ')}"

    def options(self) -> str:
        """The options of a command that a person types for this namespace."""
        context = f" --context={self.context}" if self.context else ""
        return f"-n {self.namespace}{context}"


def parsed_items(text: str) -> list[dict[str, Any]]:
    """The objects of a list, or the one object, that kubectl printed; empty if it printed none."""
    try:
        found = json.loads(text)
        return found.get("items", [found])
    except (ValueError, AttributeError):
        return []


@dataclass
class Release:
    """The objects of a release, and those that stay after it is uninstalled."""

    name: str
    kubectl: Kubectl
    objects: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    @classmethod
    def find(cls, name: str, kubectl: Kubectl) -> Release:
        """The release of this name. Raises ToolError if the cluster does not answer or has no object of it."""
        release = cls(name, kubectl)
        chosen = f"--selector=app.kubernetes.io/instance={name}"
        for item in parsed_items(kubectl.ask("get", KINDS, chosen, "--output=json")):
            release.objects.setdefault(item["kind"], []).append(item)
        if not release.objects:
            raise ToolError(
                f"there is no release {name} in namespace {kubectl.namespace}{release.elsewhere()}; install it "
                "(make install), or give another: RELEASE=... NAMESPACE=..."
            )
        return release

    def elsewhere(self) -> str:
        """A remark on the releases in other namespaces; empty if there are none, or the user may not list them."""
        chosen = "--selector=app.kubernetes.io/part-of=k8scifar"
        items = self.kubectl.items("statefulsets,jobs", "--all-namespaces", chosen) or []
        names = {f"{label(item, 'instance')} in namespace {item['metadata'].get('namespace', '')}" for item in items}
        return f" (there is {', '.join(sorted(names)[:5])})" if names else ""

    @property
    def workload(self) -> dict[str, Any] | None:
        """The StatefulSet or the newest Job; None if the release is uninstalled."""
        found = self.objects.get("StatefulSet", []) or self.objects.get("Job", [])
        return max(found, key=lambda item: item["metadata"].get("creationTimestamp", ""), default=None)

    def nodes(self, names: set[str]) -> dict[str, dict[str, Any] | None]:
        """These machines, None for one that the cluster lacks; empty if the user may not see nodes."""
        items = self.kubectl.items("nodes", *sorted(names), "--ignore-not-found") if names else None
        if items is None:
            return {}
        return dict.fromkeys(sorted(names)) | {named(item): item for item in items}

    def pods(self, component: str = "") -> list[dict[str, Any]]:
        """Its pods of a component (empty: of all), by name."""
        found = [pod for pod in self.objects.get("Pod", []) if component in ("", label(pod, "component"))]
        return sorted(found, key=named)

    def claims_of_all_kinds(self) -> list[dict[str, Any]]:
        """Its claims, those of data sets too."""
        return self.objects.get("PersistentVolumeClaim", [])

    def claims(self) -> list[dict[str, Any]]:
        """The claims with runs: the one in use first, then the newest; older ones may have been kept."""
        return ordered(self.claims_of_all_kinds(), self.claim_name())

    def claim_name(self) -> str:
        """The claim that has the workload's run; empty if there is no workload."""
        return run_claim(self.workload)

    def carriers(self) -> list[dict[str, Any]]:
        """The objects that may have the chart's annotations on the run, the most trusted first."""
        kept = [*self.objects.get("Deployment", []), *self.claims(), *self.objects.get("ConfigMap", [])]
        return [item for item in [self.workload, *kept] if item]

    def run_dir(self, needed: bool = True) -> str:
        """The run folder as the pods see it. If it is unknown: raises ToolError if `needed`, else empty."""
        for item in self.carriers():
            if found := note(item, "run-dir"):
                return found
        if not needed:
            return ""
        raise ToolError(f"the run folder of release {self.name} is unknown: give RUN_DIR={MOUNT}/runs/NAME")

    def reader(self, claim: str = "") -> tuple[str, str] | None:
        """A pod and its container that can read a claim (empty: the one in use); None if there is none.

        TensorBoard comes before the trainers. A pod whose machine is off still has the state running, but is not Ready.
        """
        claim = claim or self.claim_name()
        for component in ("tensorboard", "trainer"):
            for pod in self.pods(component):
                runs = any(status["name"] == component and "running" in status["state"] for status in statuses(pod))
                fits = claim in ("", claim_of(pod["spec"]))
                if runs and fits and answers(pod):
                    return named(pod), component
        return None

    def inside(self, *command: str) -> subprocess.CompletedProcess[str] | None:
        """Run a command in a pod that has the run's volume; None if there is no such pod."""
        if not (reader := self.reader()):
            return None
        pod, container = reader
        return self.kubectl.run("exec", pod, f"--container={container}", "--", *command, timeout=30)


def arguments(description: str) -> argparse.ArgumentParser:
    """A parser with the options that all tools share."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--release", default="cifar")
    parser.add_argument("--namespace", default="default")
    parser.add_argument("--context", default="", help="kubectl's context; default: the current one")
    return parser


def listening(host: str, port: str, command: str) -> int:
    """The port as a number. Raises ToolError if it is not a port, is in use, or needs other rights."""
    if not port.isdecimal() or not 0 < int(port) < 65536:
        raise ToolError(f"PORT={port} is no port: a number from 1 to 65535")

    def reason(number: int) -> OSError | None:
        try:
            family, *_, address = socket.getaddrinfo(host, number, type=socket.SOCK_STREAM)[0]
            socket.create_server(address, family=family).close()
        except OSError as error:
            return error
        return None

    fault = reason(int(port))
    if isinstance(fault, socket.gaierror) or (fault and fault.errno == errno.EADDRNOTAVAIL):
        raise ToolError(f"HOST={host} is no address of this machine: localhost, or 0.0.0.0 for all its networks")
    if fault and fault.errno == errno.EACCES:
        raise ToolError(f"port {port} needs root: {command} PORT=6006")
    if fault:
        free = next((str(number) for number in range(int(port) + 1, 65536) if not reason(number)), "...")
        raise ToolError(f"port {port} of {host} is taken: {command} PORT={free}")
    return int(port)


def exit_code(action: Callable[[], int | None]) -> int:
    """Run a tool and return its exit code; a ToolError becomes one line and code 2."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that clean-up runs
    try:
        code = action() or 0
        sys.stdout.flush()
        return code
    except ToolError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader (`| head`) has closed the pipe
        return 0
    except KeyboardInterrupt:
        return 130
