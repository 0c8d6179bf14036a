"""The chart's pods, run for real: commands and environments of the rendered pod template on two hosts."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import yaml
from chart_helpers import NFS, component, render, run, trainer
from hosts import command_line, several
from patience import patient

BIN = Path(sys.executable).parent
# A few seconds: 4 steps an epoch.
SMALL = {
    "epochs": 2,
    "global_batch": 50,
    "micro_batch": 25,
    "resolution": [{"until": 1.0, "pixels": 8}],
    "evaluation": {"tta": False},
    "hardware": {"precision": "fp32", "threads": 1},
    "log": {"every_seconds": 1, "tensorboard": False},
}


class Pod:
    """What the kubelet does with a pod: init containers in turn, then the trainer, started again when it ends."""

    def __init__(self, host, ordinal: int, objects: list[dict], folder: Path) -> None:
        self.host, self.ordinal, self.spec = host, ordinal, trainer(objects)
        self.is_job = any(item["kind"] == "Job" for item in objects)
        self.folder = folder / f"pod-{ordinal}-{time.monotonic_ns()}"
        (self.folder / "config").mkdir(parents=True)
        (self.folder / "config" / "train.yaml").write_text(
            component(objects, "ConfigMap", "trainer")["data"]["train.yaml"]
        )
        self.places = {
            "/volumes": str(volume_of(objects, ordinal, folder)),
            "/etc/k8scifar": str(self.folder / "config"),
            "/tmp/heartbeat": str(self.folder / "heartbeat"),
        }
        self.log = self.folder / "log"
        self.log.touch()
        self.codes: list[int] = []
        self.running = ""
        self.process: subprocess.Popen | None = None
        self._stopping = False
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _here(self, text: str) -> str:
        for there, here in self.places.items():
            text = text.replace(there, here)
        return text

    def _start(self, item: dict) -> subprocess.Popen:
        environment = {"PATH": f"{BIN}:{os.environ['PATH']}", "HOME": str(self.folder)}
        environment["K8SCIFAR_TERMINATION_LOG"] = str(self.folder / "termination-log")
        if self.is_job:
            environment["JOB_COMPLETION_INDEX"] = str(self.ordinal)
        for variable in item["env"]:
            environment[variable["name"]] = self._here(variable.get("value", self.host.name.partition(".")[0]))
        # Without a command of its own it is the image's entry point; both begin with tini, which only a pod needs.
        words = [*item.get("command", ["tini", "--", "k8scifar"])[2:], *item["args"]]
        command = [self._here(word) for word in words]
        return self.host.popen(command, environment, self.log)

    def _run(self) -> None:
        for item in [*self.spec["initContainers"], *self.spec["containers"]]:
            while not self._stopping:
                self.running, self.process = item["name"], self._start(item)
                code = self.process.wait()
                if code == 0 and item in self.spec["initContainers"]:
                    break
                self.codes.append(code)
                if self.is_job and code == 0:
                    return
                time.sleep(1.0)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """End the pod; returns the container's exit code."""
        self._stopping = True
        if self.process:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(number)
        self._thread.join(60)
        assert not self._thread.is_alive(), self.text()
        return self.codes[-1]

    @property
    def ready(self) -> bool:
        """Whether the trainer's container runs and passes its startup probe, once."""
        (item,) = self.spec["containers"]
        if self.running != item["name"] or not self.process or self.process.poll() is not None:
            return False
        probe = [self._here(word) for word in item["startupProbe"]["exec"]["command"]]
        probe[-1] = re.sub(r"seq \d+", "seq 1", probe[-1])
        return subprocess.run(probe, capture_output=True, check=False).returncode == 0

    def text(self) -> str:
        """What all its containers have printed."""
        return self.log.read_text()


def volume_of(objects: list[dict], ordinal: int, folder: Path) -> Path:
    """Where a pod's volumes are: in one folder that all see, or in one of its own if it has a claim of its own."""
    if not any(item.get("spec", {}).get("volumeClaimTemplates") for item in objects):
        return folder
    own = folder / f"volume-{ordinal}"
    own.mkdir(exist_ok=True)
    return own


def rendered(tmp_path: Path, kind: str = "StatefulSet", options: tuple[str, ...] = (), **train) -> list[dict]:
    """The objects of a small training; `options` go to helm."""
    values = tmp_path / "values.yaml"
    values.write_text(
        yaml.safe_dump({"dataset": {"source": "synthetic:200:50"}, "train": SMALL | train, "workload": {"kind": kind}})
    )
    run.cache_clear()  # the file of values may have changed
    return render(*NFS, f"-f={values}", *options)


def until(condition, seconds: float, pods) -> None:
    end = time.monotonic() + patient(seconds)
    while not condition():
        assert time.monotonic() < end, "\n\n".join(pod.text()[-3000:] for pod in pods)
        time.sleep(0.2)


def summary(folder: Path) -> dict:
    path = folder / "checkpoints" / "runs" / "cifar" / "summary.json"
    return json.loads(path.read_text()) if path.exists() else {}


def epochs(folder: Path) -> int:
    path = folder / "checkpoints" / "runs" / "cifar" / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


@contextlib.contextmanager
def cluster(objects, folder):
    pods: list[Pod] = []
    (first,) = (word for word in trainer(objects)["containers"][0]["args"] if word.startswith("--master-addr="))
    name = first.partition("=")[2]
    with several([name, name.replace("-0.", "-1.", 1)]) as hosts:
        try:
            pods += [Pod(host, ordinal, objects, folder) for ordinal, host in enumerate(hosts)]
            yield hosts, pods
        finally:
            for pod in pods:
                pod._stopping = True
            for host in hosts:
                host.kill()
            for pod in pods:
                pod._thread.join(10)


def commands(host) -> str:
    return "\n".join(command_line(pid) for pid in host.processes())
