"""A stand-in kubectl, and the objects of a release as a cluster shows them, for the tests of the cluster tools.

Its answers and messages are written by hand: a test shows what the tools make of them, not that a cluster says them.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

from chart_helpers import ROOT

TOOLS = ROOT / "chart" / "tools"
RUNNING = {"running": {"startedAt": "2026-01-01T00:00:00Z"}}

# Logs its arguments, then answers: objects and texts from files; tar is a real one on a folder that stands for a pod's.
KUBECTL = """#!{python}
import json, os, pathlib, signal, subprocess, sys, time
home = pathlib.Path({home!r})
words = [word for word in sys.argv[1:] if not word.startswith(("--namespace=", "--context=", "--request-timeout="))]
given = sys.stdin.read() if "--filename=-" in words else None
with open(home / "calls", "a") as calls:
    calls.write(json.dumps(dict(words=sys.argv[1:], given=given)) + "\\n")
if (home / "broken").exists():
    sys.exit((home / "broken").read_text())
verb = words[0]
signal.signal(signal.SIGINT, signal.SIG_DFL)  # as kubectl has it
if verb == "get" and "persistentvolumeclaims,services" in words[1]:
    print((home / "objects.json").read_text())
elif verb == "get" and words[1] == "events":
    print((home / "events").read_text())
elif verb == "get" and words[1] == "nodes" and "--ignore-not-found" in words:
    if (home / "forbidden").exists():
        sys.exit('Error from server (Forbidden): nodes is forbidden: User "me" cannot list resource "nodes"')
    print((home / "nodes").read_text())
elif verb == "get" and "--all-namespaces" in words:
    print((home / "elsewhere").read_text())
elif verb == "get" and words[1] == "pod":
    print((home / "pod.json").read_text())
elif verb == "get" or verb == "describe":
    print((home / "objects.json").read_text() if "--output=json" in words else (home / "description").read_text())
elif verb == "logs":
    print("log of", words[1], *words[2:], (home / "log").read_text(), flush=True)
    if "--follow" in words and (home / "slow").exists():
        time.sleep(60)
elif verb == "port-forward" and (home / "slow").exists():
    print("Forwarding from", words[1], flush=True)
    time.sleep(60)
elif verb == "wait":
    sys.exit((home / "never").exists())
elif verb == "exec" and "tar" in words:
    tar = words[words.index("tar"):]
    here = [word.replace("=/volumes", "=" + str(home / "volumes")) for word in tar]
    empty = home / "empty"
    if empty.exists() and empty.read_text() == words[1]:
        sys.exit("tar: /volumes/checkpoints/runs: Cannot open: No such file or directory")
    made = subprocess.run(here, capture_output=True)
    cut = home / "cut"
    sys.stdout.buffer.write(made.stdout[: len(made.stdout) // 2 // 512 * 512] if cut.exists() else made.stdout)
    if not cut.exists() or cut.read_text() != "always":
        cut.unlink(missing_ok=True)
    sys.stdout.flush()
    if (home / "slow").exists():
        (home / "begun").touch()
        time.sleep(60)
    sys.stderr.buffer.write(made.stderr)
    sys.exit(made.returncode)
elif verb == "exec" and "cat" in words:
    path = home / words[-1].lstrip("/")
    print(path.read_text()) if path.exists() else sys.exit("cat: no such file")
elif verb == "exec" and (home / "progress").exists():
    print((home / "progress").read_text())
elif verb == "exec":
    print("cifar: training, 1 epoch(s) finished")
"""


class Stage:
    """A PATH with stand-ins, and a folder that stands for the cluster."""

    def __init__(self, folder: Path) -> None:
        self.home, self.bin = folder, folder / "bin"
        self.bin.mkdir()
        self.log = folder / "calls"
        for name in ("objects.json", "events", "description", "log", "elsewhere"):
            (folder / name).write_text('{"items": []}')
        self.nodes(node("node-a"))
        self.tool("kubectl", KUBECTL.format(python=sys.executable, home=str(folder)))

    def tool(self, name: str, script: str = "") -> None:
        """Put a stand-in on PATH; without a script it logs its arguments and succeeds."""
        script = script if script.startswith("#!") else f'#!/bin/sh\necho "{name} $*" >>{self.home}/tools\n{script}\n'
        (self.bin / name).write_text(script)
        (self.bin / name).chmod(0o755)

    def objects(self, items: list[dict]) -> None:
        """What the cluster holds of the release."""
        (self.home / "objects.json").write_text(json.dumps({"items": items}))

    def nodes(self, *items: dict) -> None:
        """The machines that the cluster has."""
        (self.home / "nodes").write_text(json.dumps({"items": items}))

    def events(self, *items: dict) -> None:
        """The events that the cluster holds."""
        (self.home / "events").write_text(json.dumps({"items": items}))

    def run(self, tool: str, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a tool as make does."""
        command = [sys.executable, str(TOOLS / f"{tool}.py"), *words]
        base = {"PATH": f"{self.bin}:/usr/bin:/bin", "HOME": str(self.home)}
        if "kubectl" in environment:
            base["PATH"] = str(self.home / "nothing")
            environment = {}
        options = {"capture_output": True, "text": True, "cwd": self.home, "timeout": 60}
        return subprocess.run(command, env=base | environment, **options)

    @property
    def calls(self) -> list[dict]:
        """What kubectl was asked."""
        return [json.loads(line) for line in self.log.read_text().splitlines()] if self.log.exists() else []

    def said(self, verb: str) -> list[str]:
        """The command lines of a verb."""
        lines = [" ".join(word for word in call["words"] if not word.startswith("--namespace")) for call in self.calls]
        return [line for line in lines if line.startswith(verb)]

    @property
    def others(self) -> list[str]:
        """What the other tools were asked."""
        path = self.home / "tools"
        return path.read_text().splitlines() if path.exists() else []


def pod(objects: list[dict], name: str, component: str, state: dict, at: str = "") -> dict:
    """A pod of a workload as the API server shows it, standing at a container in a state."""
    kinds = ("Deployment",) if component == "tensorboard" else ("StatefulSet", "Job")
    template = copy.deepcopy(next(item for item in objects if item["kind"] in kinds)["spec"]["template"])
    inits = [container["name"] for container in template["spec"].get("initContainers", [])]
    before = inits[: inits.index(at)] if at in inits else inits
    done = [{"name": each, "state": {"terminated": {"exitCode": 0}}} for each in before]
    status = {"initContainerStatuses": done, "containerStatuses": []}
    standing = {"name": at or component, "state": state, "restartCount": 2, "lastState": {}}
    if "message" in state.get("waiting", {}):
        ended = {"exitCode": 14, "message": state["waiting"].pop("message")}
        standing["lastState"] = {"terminated": ended}
    if at in inits:
        status["initContainerStatuses"].append(standing)
        status["containerStatuses"].append({"name": component, "state": {"waiting": {"reason": "PodInitializing"}}})
    else:
        status["containerStatuses"].append(standing)
    metadata = {"name": name, "labels": template["metadata"]["labels"]}
    runs = "running" in state and at not in inits
    status["containerStatuses"][-1] |= {"ready": runs, "started": runs}
    status["conditions"] = [{"type": kind, "status": str(runs)} for kind in ("Ready", "ContainersReady")]
    status["conditions"].append({"type": "PodScheduled", "status": "True"})
    status["phase"] = "Running" if at not in inits else "Pending"
    spec = template["spec"] | {"nodeName": "node-a"}
    spec["volumes"] = spec["volumes"] + own_volumes(objects, name if component == "trainer" else "")
    return {"kind": "Pod", "apiVersion": "v1", "metadata": metadata, "spec": spec, "status": status}


def node(name: str, ready: str = "True", message: str = "") -> dict:
    """A machine as the API server shows it."""
    state = {"type": "Ready", "status": ready, "message": message, "lastTransitionTime": "2026-01-01T00:00:00Z"}
    return {"kind": "Node", "apiVersion": "v1", "metadata": {"name": name}, "status": {"conditions": [state]}}


def event(about: dict, reason: str, message: str, seconds: float = 300, **more: object) -> dict:
    """A warning about an object, seen last so long ago."""
    moment = datetime.fromtimestamp(time.time() - seconds, timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    named = {"kind": about["kind"], "name": about["metadata"]["name"], "uid": about["metadata"].get("uid")}
    found = {"metadata": {"name": f"{named['name']}.{reason}"}, "type": "Warning", "reason": reason, "message": message}
    return {"kind": "Event", "apiVersion": "v1", "involvedObject": named, "lastTimestamp": moment} | found | more


def installed(objects: list[dict], *pods: dict) -> list[dict]:
    """The release's objects and its pods."""
    kinds = ("StatefulSet", "Job", "Deployment", "PersistentVolumeClaim", "Service", "ConfigMap")
    found = sorted((item for item in objects if item["kind"] in kinds), key=lambda item: kinds.index(item["kind"]) == 5)
    return [*copy.deepcopy(found), *own_claims(objects), *pods]


def own_volumes(objects: list[dict], pod_name: str) -> list[dict]:
    """What the StatefulSet's controller adds to a pod: the volumes of its own claims."""
    templates = [each for item in objects for each in item.get("spec", {}).get("volumeClaimTemplates", [])]
    names = [each["metadata"]["name"] for each in templates if pod_name]
    return [{"name": name, "persistentVolumeClaim": {"claimName": f"{name}-{pod_name}"}} for name in names]


def own_claims(objects: list[dict]) -> list[dict]:
    """The claims that the StatefulSet's controller makes, its selector's labels laid over the template's own."""
    found = []
    for item in objects:
        for template in item.get("spec", {}).get("volumeClaimTemplates", []):
            for ordinal in range(item["spec"]["replicas"]):
                claim = copy.deepcopy(template) | {"kind": "PersistentVolumeClaim", "apiVersion": "v1"}
                name = f"{template['metadata']['name']}-{item['metadata']['name']}-{ordinal}"
                labels = template["metadata"]["labels"] | item["spec"]["selector"]["matchLabels"]
                claim["metadata"] = {"name": name, "namespace": "default", "labels": labels}
                found.append(claim)
    return found


def everything_runs(objects: list[dict]) -> list[dict]:
    (workload,) = (item["metadata"]["name"] for item in objects if item["kind"] == "StatefulSet")
    trainers = [pod(objects, f"{workload}-{index}", "trainer", RUNNING) for index in (0, 1)]
    return installed(objects, *trainers, pod(objects, "cifar-tensorboard-x", "tensorboard", RUNNING))
