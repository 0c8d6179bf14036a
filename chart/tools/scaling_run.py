"""One training that `make scaling` measures in a cluster: waits for its end, says what it does, reads its figures."""

from __future__ import annotations

import contextlib
import json
import re
import time
from dataclasses import dataclass, field
from typing import Any

from cluster import progress
from events import news
from kube import Kubectl, Release, ToolError
from kube_objects import statuses
from pod_states import standing

TELL = 60.0  # seconds between lines where nothing changes
FINE = re.compile(r"(running|starting|about to start|done|being deleted|pending)\b")
MISTAKE = 2  # exit code of a container: no restart mends it


class Failed(Exception):
    """A training that does not get to its end by itself, in one line."""


@dataclass
class Run:
    """The training of a release on so many nodes, in the run folder of this name.

    It is looked at every `poll` seconds; what may mend itself is given `patience` seconds.
    """

    kubectl: Kubectl
    release: str
    name: str
    nodes: int
    poll: float
    patience: float
    _since: float | None = None  # when the trouble began
    _told: list[str] = field(default_factory=list)
    _when: float = 0.0
    _said: str = ""  # by the run folder, the last time that it was asked
    _old: set[str] | None = None  # mistakes that were there before, and may be mended by now

    def finished(self) -> dict[str, Any]:
        """Wait for the run's summary; its figures. Raises Failed where there will be none."""
        while True:
            try:
                release = Release.find(self.release, self.kubectl)
                if summary := parsed(self.file(release, "summary.json")):
                    return self.figures(release, summary)
                self._look(release)
            except ToolError as error:  # the cluster is out of reach, perhaps for a moment
                if str(error).startswith("there is no release"):
                    raise Failed("somebody has uninstalled the release") from None
                self._tell([str(error)])
                self._bear(str(error))
            time.sleep(self.poll)

    def figures(self, release: Release, summary: dict[str, Any]) -> dict[str, Any]:
        """What is kept of a finished run; images_per_second is of its last epoch, without evaluation."""
        epochs = [found for line in self.file(release, "metrics.jsonl").splitlines() if (found := parsed(line))]
        if not epochs:
            raise ToolError(f"run {self.name} is done, but its metrics.jsonl can't be read")
        return {
            "count": self.nodes,
            "images_per_second": epochs[-1]["images_per_second"],
            "machines": [pod["spec"].get("nodeName", "") for pod in self.pods(release)],
            "run": self.name,
            "epochs": summary["epochs"],
            "ranks": summary["world_size"],
            "global_batch": summary["global_batch"],
            "device": summary["device"],
            "torch": summary.get("versions", {}).get("torch", "unknown"),
            "comm": summary.get("identity", {}).get("distributed.comm", "communication unknown"),
            "alone": summary.get("machines"),
        }

    def pods(self, release: Release) -> list[dict[str, Any]]:
        """The pods that take part, by ordinal."""
        found = {int(pod["metadata"]["name"].rpartition("-")[2]): pod for pod in release.pods("trainer")}
        return [pod for ordinal, pod in sorted(found.items()) if ordinal < self.nodes]

    def file(self, release: Release, name: str) -> str:
        """The text of a file of the run folder; empty where it is not there, or no pod can read it.

        Raises Failed where the release is gone, or trains something else.
        """
        if not release.workload:
            raise Failed("somebody has uninstalled the release")
        folder = release.run_dir()
        if not folder.endswith(f"/{self.name}"):
            raise Failed(f"somebody has upgraded the release, which trains in {folder} now")
        reader = release.reader()
        if not reader:
            return ""
        pod, container = reader
        done = release.kubectl.run("exec", pod, f"--container={container}", "--", "cat", f"{folder}/{name}", timeout=30)
        return done.stdout if done.returncode == 0 else ""

    def _look(self, release: Release) -> None:
        """Say how the pods stand, or how far training is. Raises Failed."""
        pods = self.pods(release)
        states = {pod["metadata"]["name"]: standing(pod) for pod in pods}
        lines = {name: " ".join([name, *words]).replace("  ", " ") for name, words in states.items()}
        bad = [lines[name] for name, words in states.items() if not FINE.match(words[1])]
        wrong = {end for pod in pods for end in mistakes(pod)}
        self._old = wrong if self._old is None else self._old
        if wrong - self._old:
            raise Failed("; ".join(bad))
        runs = [name for name, (container, words) in states.items() if (container, words[:7]) == ("trainer", "running")]
        missing = [f"{len(pods)} of {self.nodes} pods are there"] if len(pods) < self.nodes else []
        if len(runs) < self.nodes:
            self._said = ""
            self._tell([*lines.values(), *missing, *news(release)[-1:]])
        elif self._due():  # asked seldom, for the answer takes the training's processor
            self._said = progress(release).partition("\n")[0].removeprefix(f"{self.name}: ")
            self._tell([self._said])
        if self._said.startswith("failed"):
            bad.append(self._said)
        self._bear("; ".join(bad))

    def _due(self) -> bool:
        return time.monotonic() - self._when >= TELL

    def _tell(self, told: list[str]) -> None:
        if told != self._told or self._due():
            print(f"  nodes={self.nodes}: {'; '.join(told)}", flush=True)
            self._told, self._when = told, time.monotonic()

    def _bear(self, trouble: str) -> None:
        """Be patient with trouble, but not for ever; empty: all is well."""
        now = time.monotonic()
        self._since = None if not trouble else self._since if self._since is not None else now
        if self._since is not None and now - self._since >= self.patience:
            raise Failed(f"{trouble} (for {self.patience:.0f} seconds and more)")


def mistakes(pod: dict[str, Any]) -> set[str]:
    """The ends with the exit code of a mistake of containers that do not run again, each told from all others."""
    found = set()
    for each in statuses(pod):
        ended = each["state"].get("terminated") or each.get("lastState", {}).get("terminated") or {}
        if "running" not in each["state"] and ended.get("exitCode") == MISTAKE:
            found.add(" ".join([pod["metadata"]["name"], each["name"], str(ended.get("finishedAt", ""))]))
    return found


def parsed(text: str) -> dict[str, Any] | None:
    """A JSON object; None where it is none, or not whole."""
    with contextlib.suppress(ValueError):
        found = json.loads(text)
        return found if isinstance(found, dict) else None
    return None
