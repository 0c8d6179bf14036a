"""kubectl, and what it says of a release of the chart; for the tools beside it. Python's standard library only."""

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

from kube_objects import answers, label, note, statuses
from volumes import claim_of, ordered, run_claim

ROOT = Path(__file__).resolve().parents[2]
MOUNT = "/volumes/checkpoints"
KINDS = "statefulsets,jobs,deployments,pods,persistentvolumeclaims,services,configmaps"
# What kubectl says where it gets no answer, most telling first -> what it means, and what to type.
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
        """What kubectl prints. Raises ToolError where it fails: what that means, and kubectl's own words."""
        done = self.run(*arguments, "--request-timeout=20s", given=given)
        if done.returncode == 0:
            return done.stdout
        if "forbidden" in done.stderr.lower() and holds_items(done.stdout):
            return done.stdout  # some kinds may be seen, others not
        raise ToolError(self.why(arguments, done.stderr, done.returncode))

    def why(self, arguments: tuple[str, ...], said: str, code: int) -> str:
        """One line on a failure of kubectl."""
        lines = [line.strip() for line in said.splitlines() if line.strip()]
        told = re.compile(r"error|unable to|the connection to|no answer", re.I)
        words = next((line for line in lines if told.match(line)), lines[-1] if lines else f"exit code {code}")
        if found := FORBIDDEN.search(said):
            options = self.options()
            return (
                f"{found['user']} may not {found['verb']} {found['what']} in namespace {found['where'] or 'any'}: "
                f"another NAMESPACE=..., or ask who runs the cluster for the role; `kubectl {options} auth can-i "
                "--list` shows what you may do"
            )
        for pattern, meaning in FAILURES:
            if re.search(pattern, words, re.I):
                return f"{meaning} ({words.removeprefix('error: ')})"
        return f"kubectl {arguments[0]}: {words.removeprefix('error: ')}"

    def options(self) -> str:
        """The options of a command that a person types for this namespace."""
        context = f" --context={self.context}" if self.context else ""
        return f"-n {self.namespace}{context}"


def holds_items(text: str) -> bool:
    """Whether a list that kubectl printed has something in it."""
    try:
        return bool(json.loads(text)["items"])
    except (ValueError, KeyError, TypeError):
        return False


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
                f"there is no release {name} in namespace {kubectl.namespace}{release.elsewhere()}; install it "
                "(make install), or say which: RELEASE=... NAMESPACE=..."
            )
        return release

    def elsewhere(self) -> str:
        """The releases that there are, in words; empty where that can't be seen."""
        chosen = "--selector=app.kubernetes.io/part-of=k8scifar"
        done = self.kubectl.run(
            "get", "statefulsets,jobs", "--all-namespaces", chosen, "--output=json", "--request-timeout=10s"
        )
        if done.returncode or not holds_items(done.stdout):
            return ""
        items = json.loads(done.stdout)["items"]
        names = {f"{label(item, 'instance')} in namespace {item['metadata'].get('namespace', '')}" for item in items}
        return f" (there is {', '.join(sorted(names)[:5])})"

    @property
    def workload(self) -> dict[str, Any] | None:
        """The StatefulSet or the newest Job; None where the release is gone."""
        found = self.objects.get("StatefulSet", []) or self.objects.get("Job", [])
        return max(found, key=lambda item: item["metadata"].get("creationTimestamp", ""), default=None)

    def nodes(self, names: set[str]) -> dict[str, dict[str, Any] | None]:
        """These machines, None for one that the cluster does not have; empty where a person may not look at nodes."""
        if not names:
            return {}
        asked = ("get", "nodes", *sorted(names), "--ignore-not-found", "--output=json", "--request-timeout=10s")
        done = self.kubectl.run(*asked)
        if done.returncode:
            return {}
        found = json.loads(done.stdout) if done.stdout.strip() else {"items": []}
        items = found.get("items", [found])
        return dict.fromkeys(sorted(names)) | {item["metadata"]["name"]: item for item in items}

    def pods(self, component: str = "") -> list[dict[str, Any]]:
        """Its pods of a component (all: empty), by name."""
        found = [pod for pod in self.objects.get("Pod", []) if component in ("", label(pod, "component"))]
        return sorted(found, key=lambda pod: pod["metadata"]["name"])

    def claims(self) -> list[dict[str, Any]]:
        """The claims of runs, the one in use first, then the newest: an older one may be kept."""
        return ordered(self.objects.get("PersistentVolumeClaim", []), self.claim_name())

    def claim_name(self) -> str:
        """The claim that the workload keeps its run on; empty where there is no workload."""
        return run_claim(self.workload)

    def carriers(self) -> list[dict[str, Any]]:
        """What may carry the chart's notes on the run, most trusted first."""
        kept = [*self.objects.get("Deployment", []), *self.claims(), *self.objects.get("ConfigMap", [])]
        return [item for item in [self.workload, *kept] if item]

    def run_dir(self, needed: bool = True) -> str:
        """The run folder as the pods see it. Where it is not known, raises ToolError, or is empty if not `needed`."""
        for item in self.carriers():
            if found := note(item, "run-dir"):
                return found
        if not needed:
            return ""
        raise ToolError(f"release {self.name} does not say where its run is: say it with RUN_DIR={MOUNT}/runs/NAME")

    def reader(self, claim: str = "") -> tuple[str, str] | None:
        """A pod that answers, and its container, that has a claim mounted (empty: the one in use), if any.

        TensorBoard's before the trainers'. A pod whose machine is off still says "running", but is not Ready.
        """
        claim = claim or self.claim_name()
        for component in ("tensorboard", "trainer"):
            for pod in self.pods(component):
                runs = any(status["name"] == component and "running" in status["state"] for status in statuses(pod))
                fits = claim in ("", claim_of(pod["spec"]))
                if runs and fits and answers(pod):
                    return pod["metadata"]["name"], component
        return None


def arguments(description: str) -> argparse.ArgumentParser:
    """A parser with the options that every tool takes."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--release", default="cifar")
    parser.add_argument("--namespace", default="default")
    parser.add_argument("--context", default="", help="kubectl's context; default: the current one")
    return parser


def listening(host: str, port: str, command: str) -> int:
    """The port as a number. Raises ToolError where it is none, taken, or can't be listened at by this user."""
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
    """Run a tool; a ToolError is one line and exit code 2. A reader that has had enough (`| head`) is no fault."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was begun is taken back
    try:
        code = action() or 0
        sys.stdout.flush()
        return code
    except ToolError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left unsaid goes there at the end
        return 0
    except KeyboardInterrupt:
        return 130
