"""Pods on several hosts, run as a kubelet runs them: what each must do is `k8scifar launch` under a restart loop."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import hosts
from hosts import Host
from patience import patient

BIN = Path(sys.executable).parent
PORT = 29500
_STEP = re.compile(r"\bstep (\d+)/")
_RESUMED = re.compile(r"resuming at step (\d+)")


def names(count: int) -> list[str]:
    """The pods' host names, as the chart's headless service gives them."""
    return [f"cifar-{number}.cifar.lab.svc.cluster.local" for number in range(count)]


class Pod:
    """A container that is started again, a second after it ended, until it is told to stop."""

    def __init__(self, host: Host, command: list[str], environment: dict[str, str], log: Path) -> None:
        self.host, self.command, self.environment, self.log = host, command, environment, log
        self.starts: list[float] = []
        self.codes: list[int] = []
        self._stopping = threading.Event()
        self.log.touch()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stopping.is_set():
            self.starts.append(time.monotonic())
            self.codes.append(self.host.popen(self.command, self.environment, self.log).wait())
            self._stopping.wait(1.0)

    def stop(self) -> None:
        """No more restarts, and SIGKILL for what runs."""
        self._stopping.set()
        self.host.kill()
        self._thread.join(20)

    def text(self) -> str:
        """What it has printed, in all its lives."""
        return self.log.read_text(errors="replace")


class Group:
    """A pod on each machine, which train one run in `folder`, and what their logs tell: when each step was done."""

    def __init__(
        self, machines: list[Host], folder: Path, config: Path, data: Path, name: str, *arguments: str
    ) -> None:
        self.machines, self.folder, self.name = machines, folder, name
        self.run_dir = folder / "runs" / name
        self.steps: list[tuple[float, int]] = []  # (time seen, step) of rank 0's lines
        self.resumed: list[tuple[float, int]] = []
        self.pods: list[Pod] = []
        self._config, self._data, self._arguments = config, data, arguments
        self._done = threading.Event()

    def start(self, rank: int, data: Path | None = None, runs: Path | None = None, **variables: str) -> Pod:
        """Start the pod of this rank, with volumes and environment variables of its own if they are given."""
        data, runs = data or self._data, runs or self.folder / "runs"
        paths = [f"--config={self._config}", f"--data-dir={data}", f"--runs-dir={runs}"]
        command = [
            *(str(BIN / "k8scifar"), "launch", f"--nnodes={len(self.machines)}", "--nproc-per-node=1"),
            *(f"--node-rank={rank}", f"--master-addr={self.machines[0].name}", f"--master-port={PORT}"),
            *("--restart=always", "--when-done=hold", f"--name={self.name}", *paths, *self._arguments),
        ]
        own = self.folder / f"{self.name}-{rank}"
        own.mkdir(exist_ok=True)
        environment = {
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "HOME": str(own),
            "TMPDIR": str(own),
            "K8SCIFAR_TERMINATION_LOG": str(own / "termination-log"),
            "K8SCIFAR_HEARTBEAT": str(own / "heartbeat"),
            **variables,
            # faults of the test, then changed sources of its runner
            "PYTHONPATH": ":".join(filter(None, (variables.get("PYTHONPATH"), os.environ.get("PYTHONPATH")))),
        }
        pod = Pod(self.machines[rank], command, environment, own / "log")
        self.pods.append(pod)
        if rank == 0:
            threading.Thread(target=self._follow, args=(pod.log,), daemon=True).start()
        return pod

    def _follow(self, log: Path) -> None:
        with open(log, errors="replace") as file:
            while not self._done.is_set():
                if not (line := file.readline()):
                    time.sleep(0.02)
                elif found := _RESUMED.search(line):
                    self.resumed.append((time.monotonic(), int(found[1])))
                elif found := _STEP.search(line):
                    self.steps.append((time.monotonic(), int(found[1])))

    @property
    def step(self) -> int:
        """The last step that rank 0 has told."""
        return self.steps[-1][1] if self.steps else 0

    @property
    def done(self) -> bool:
        """Whether all pods hold after the end of training."""
        return all("holding until" in pod.text() for pod in self.pods)

    def summary(self) -> dict:
        """The run's summary; empty before its end."""
        path = self.run_dir / "summary.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def until(self, condition, seconds: float, what: str) -> None:
        """Wait for it. Raises AssertionError with the ends of all logs."""
        seconds = patient(seconds)
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                logs = "\n".join(f"--- pod {rank}\n{pod.text()[-3000:]}" for rank, pod in enumerate(self.pods))
                raise AssertionError(f"not within {seconds:.0f} s: {what}\n{logs}")
            time.sleep(0.05)

    def stop(self) -> None:
        """End it all."""
        self._done.set()
        for pod in self.pods:
            pod.stop()


@contextlib.contextmanager
def group(*arguments) -> Iterator[Group]:
    """`Group` on two fresh hosts; see its arguments."""
    with hosts.several(names(2)) as machines:
        pair = Group(machines, *arguments)
        try:
            yield pair
        finally:
            pair.stop()


def in_space(host: Host, *command: str) -> subprocess.CompletedProcess:
    """Run a command in a host's network."""
    return subprocess.run(["ip", "netns", "exec", host.space, *command], capture_output=True, text=True, check=False)
