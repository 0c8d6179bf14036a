"""The rendered pods, run for real: commands and environments of the chart's pod template on two hosts."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml
from chart_helpers import CHART, NFS, helm, one, trainer
from hosts import command_line, two
from patience import patient

pytestmark = [pytest.mark.helm, pytest.mark.slow]
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
        (self.folder / "config" / "train.yaml").write_text(one(objects, "ConfigMap")["data"]["train.yaml"])
        self.places = {
            "/volumes": str(folder),
            "/etc/k8scifar": str(self.folder / "config"),
            "/tmp/heartbeat": str(self.folder / "heartbeat"),
        }
        self.log = self.folder / "log"
        self.log.touch()
        self.codes: list[int] = []
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
        command = [self._here(word) for word in item["command"] + item.get("args", [])]
        return self.host.popen(command, environment, self.log)

    def _run(self) -> None:
        for item in [*self.spec["initContainers"], *self.spec["containers"]]:
            while not self._stopping:
                self.process = self._start(item)
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

    def text(self) -> str:
        return self.log.read_text()


def rendered(tmp_path: Path, kind: str = "StatefulSet", **train) -> list[dict]:
    values = tmp_path / "values.yaml"
    values.write_text(
        yaml.safe_dump({"dataset": {"source": "synthetic:200:50"}, "train": SMALL | train, "workload": {"kind": kind}})
    )
    command = [helm(), "template", "cifar", str(CHART), "-f", "values/two-node.yaml", "-f", str(values), NFS[1]]
    done = subprocess.run(command, capture_output=True, text=True, cwd=CHART.parent, check=True)
    return [item for item in yaml.safe_load_all(done.stdout) if item]


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
    with two([name, name.replace("-0.", "-1.", 1)]) as hosts:
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


def test_the_rendered_pods_train_hold_and_idle_again(tmp_path):
    objects = rendered(tmp_path)
    with cluster(objects, tmp_path) as (hosts, pods):
        until(lambda: all("holding until" in pod.text() for pod in pods), 120, pods)
        found = summary(tmp_path)
        assert (found["world_size"], found["epochs"]) == (2, 2)
        assert [pod.codes for pod in pods] == [[], []]
        for host, pod in zip(hosts, pods, strict=True):
            until(lambda host=host: "k8scifar.agent" not in commands(host), 10, pods)
            assert "k8scifar launch" in commands(host)
            assert (pod.folder / "termination-log").read_text() == "done\n"
        assert "packed into" in pods[0].text() and "packed into" not in pods[1].text()

        status = subprocess.run(
            [BIN / "k8scifar", "status", str(tmp_path / "checkpoints/runs/cifar")], capture_output=True, text=True
        )
        assert status.returncode == 0 and status.stdout.startswith("cifar: done: test accuracy"), status

        assert pods[1].stop() == 0
        pods[1] = Pod(hosts[1], 1, objects, tmp_path)
        until(lambda: "holding until" in pods[1].text(), 20, pods)
        assert "k8scifar.agent" not in commands(hosts[1])
        assert epochs(tmp_path) == 2
        before = (pods[1].folder / "heartbeat").stat().st_mtime
        until(lambda: (pods[1].folder / "heartbeat").stat().st_mtime > before, 15, pods)
        assert [pod.stop() for pod in pods] == [0, 0]


def test_a_lost_pod_costs_the_other_nothing_and_an_upgrade_converges(tmp_path):
    with cluster(rendered(tmp_path, epochs=2000), tmp_path) as (hosts, pods):
        until(lambda: epochs(tmp_path) >= 2, 120, pods)
        survivor = pods[0].process.pid

        # The machine of pod 1 loses power; the pod comes again.
        seen = epochs(tmp_path)
        hosts[1].kill()
        until(lambda: epochs(tmp_path) > seen + 1, 90, pods)
        assert pods[0].process.pid == survivor and pods[0].codes == []
        assert "resuming from" in pods[0].text()

        # helm upgrade: the last pod first, while the other still trains.
        upgraded = rendered(tmp_path, epochs=epochs(tmp_path) + 12, optimizer={"lr": 0.01})
        pods[1].stop()
        pods[1] = Pod(hosts[1], 1, upgraded, tmp_path)
        until(lambda: "do not belong together" in pods[0].text() + pods[1].text(), 90, pods)
        trained = epochs(tmp_path)
        pods[0].stop()
        assert epochs(tmp_path) == trained, "two ranks of different configurations have trained together"
        pods[0] = Pod(hosts[0], 0, upgraded, tmp_path)
        until(lambda: summary(tmp_path).get("identity", {}).get("optimizer.lr") == 0.01, 120, pods)
        assert epochs(tmp_path) == summary(tmp_path)["epochs"] > trained
        assert "resuming from" in pods[0].text()
        until(lambda: all("holding until" in pod.text() for pod in pods), 30, pods)


def test_a_jobs_pods_end_and_a_pod_made_anew_ends_at_once(tmp_path):
    objects = rendered(tmp_path, kind="Job")
    with cluster(objects, tmp_path) as (hosts, pods):
        until(lambda: [pod.codes for pod in pods] == [[0], [0]], 120, pods)
        assert (summary(tmp_path)["world_size"], summary(tmp_path)["epochs"]) == (2, 2)
        pods[1] = Pod(hosts[1], 1, objects, tmp_path)
        until(lambda: pods[1].codes == [0], 30, pods)
