"""Wait for one training of `make scaling NODES=2`, print its progress and read its figures."""

from __future__ import annotations

import contextlib
import json
import re
import time
from dataclasses import dataclass, field
from typing import Any

from cluster import progress
from events import warnings
from kube import Release, ToolError
from kube_objects import statuses
from pod_states import state_of
from scaling_chart import Chart

REPEAT = 60.0  # seconds between lines while nothing changes
FINE = re.compile(r"(running|starting|about to start|done|being deleted|pending)\b")
USER_MISTAKE = 2  # exit code of a container; no restart helps


class Failed(Exception):
    """The training can't end without help; the message is one line."""


@dataclass
class Run:
    """The training on so many nodes. A fault that lasts `patience` seconds ends the measurement."""

    chart: Chart
    nodes: int
    series: str
    poll: float
    patience: float
    _fault_began: float | None = None
    _printed: list[str] = field(default_factory=list)
    _printed_at: float = 0.0
    _progress: str = ""
    _former_mistakes: set[str] | None = None  # of pods from before this installation

    @property
    def name(self) -> str:
        """The name of the run and its folder."""
        return self.chart.run_name(self.nodes, self.series)

    def figures(self) -> dict[str, Any]:
        """Wait for the end of the training and return its figures. Raises Failed."""
        while True:
            try:
                release = Release.find(self.chart.release, self.chart.kubectl)
                if summary := parsed(self._file(release, "summary.json")):
                    return self._figures(release, summary)
                self._watch(release)
            except ToolError as error:  # the cluster may be out of reach for a moment
                if str(error).startswith("there is no release"):
                    raise Failed("somebody has uninstalled the release") from None
                self._print([str(error)])
                self._endure(str(error))
            time.sleep(self.poll)

    def _figures(self, release: Release, summary: dict[str, Any]) -> dict[str, Any]:
        """The figures of a finished run; images_per_second is the last epoch's, without evaluation."""
        epochs = [found for line in self._file(release, "metrics.jsonl").splitlines() if (found := parsed(line))]
        if not epochs:
            raise ToolError(f"run {self.name} is done, but its metrics.jsonl can't be read")
        return {
            "count": self.nodes,
            "images_per_second": epochs[-1]["images_per_second"],
            "machines": [pod["spec"].get("nodeName", "") for pod in self._pods(release)],
            "run": self.name,
            "epochs": summary["epochs"],
            "ranks": summary["world_size"],
            "global_batch": summary["global_batch"],
            "device": summary["device"],
            "torch": summary.get("versions", {}).get("torch", "unknown"),
            "comm": summary.get("identity", {}).get("distributed.comm", "communication unknown"),
            "alone": summary.get("machines"),
        }

    def _pods(self, release: Release) -> list[dict[str, Any]]:
        """The pods of this training, by ordinal; those of a larger one may still be there."""
        found = {int(pod["metadata"]["name"].rpartition("-")[2]): pod for pod in release.pods("trainer")}
        return [pod for ordinal, pod in sorted(found.items()) if ordinal < self.nodes]

    def _file(self, release: Release, name: str) -> str:
        """The text of a file in the run folder; empty if it can't be read yet.

        Raises Failed if the release is gone or trains another run.
        """
        if not release.workload:
            raise Failed("somebody has uninstalled the release")
        folder = release.run_dir()
        if not folder.endswith(f"/{self.name}"):
            raise Failed(f"somebody has upgraded the release, which trains in {folder} now")
        done = release.inside("cat", f"{folder}/{name}")
        return done.stdout if done and done.returncode == 0 else ""

    def _watch(self, release: Release) -> None:
        """Print the pods' states or the progress of the training. Raises Failed."""
        pods = self._pods(release)
        states = {pod["metadata"]["name"]: state_of(pod) for pod in pods}
        lines = {name: " ".join(filter(None, [name, *state])) for name, state in states.items()}
        faults = [lines[name] for name, (_, words) in states.items() if not FINE.match(words)]
        mistakes = {end for pod in pods for end in mistaken_ends(pod)}
        if self._former_mistakes is None:
            self._former_mistakes = mistakes
        if mistakes - self._former_mistakes:
            raise Failed("; ".join(faults))
        training = [name for name, (at, words) in states.items() if at == "trainer" and words.startswith("running")]
        if len(training) < self.nodes:
            self._progress = ""
            missing = [f"{len(pods)} of {self.nodes} pods are there"] if len(pods) < self.nodes else []
            self._print([*lines.values(), *missing, *warnings(release)[-1:]])
        elif self._is_due():  # seldom, because the answer takes processor time from the training
            self._progress = progress(release).partition("\n")[0].removeprefix(f"{self.name}: ")
            self._print([self._progress])
        if self._progress.startswith("failed"):
            faults.append(self._progress)
        self._endure("; ".join(faults))

    def _is_due(self) -> bool:
        return time.monotonic() - self._printed_at >= REPEAT

    def _print(self, parts: list[str]) -> None:
        if parts != self._printed or self._is_due():
            print(f"  nodes={self.nodes}: {'; '.join(parts)}", flush=True)
            self._printed, self._printed_at = parts, time.monotonic()

    def _endure(self, fault: str) -> None:
        """Raise Failed once there has been a fault for `patience` seconds; an empty text is no fault."""
        now = time.monotonic()
        if not fault:
            self._fault_began = None
        elif self._fault_began is None:
            self._fault_began = now
        if self._fault_began is not None and now - self._fault_began >= self.patience:
            raise Failed(f"{fault} (for {self.patience:.0f} seconds or longer)")


def mistaken_ends(pod: dict[str, Any]) -> set[str]:
    """An id for each end of a container, not running now, with the exit code of a user's mistake."""
    found = set()
    for each in statuses(pod):
        ended = each["state"].get("terminated") or each.get("lastState", {}).get("terminated") or {}
        if "running" not in each["state"] and ended.get("exitCode") == USER_MISTAKE:
            found.add(f"{pod['metadata']['name']} {each['name']} {ended.get('finishedAt', '')}")
    return found


def parsed(text: str) -> dict[str, Any] | None:
    """A JSON object; None if the text is not a whole one."""
    with contextlib.suppress(ValueError):
        found = json.loads(text)
        return found if isinstance(found, dict) else None
    return None
