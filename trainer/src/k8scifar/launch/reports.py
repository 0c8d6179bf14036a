"""What the processes of one attempt write for each other: one JSON file each, in a folder that lives as long.

| file | written by | read by |
|---|---|---|
| `rank-N.json`, a `RankReport` | the worker of local rank N | the supervisor, the agent |
| `agent.json`, an `AgentReport` | torchrun's agent | the supervisor |
| `policy.json`, `membership.Policy` | the supervisor, on node 0 of an elastic group | the agent |
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from k8scifar.errors import CRASHED, FAILED, LATE, PEER_LOST, PREEMPTED, USER_MISTAKE

FOLDER = "K8SCIFAR_REPORTS"  # environment variable: where the agent and the ranks of an attempt write


@dataclass(frozen=True)
class RankReport:
    """One rank; the file exists from the rank's start on."""

    exit_code: int | None = None
    """None while the rank runs, and for one that was killed."""
    reason: str = ""
    reason_at: float = 0.0
    """time.monotonic(), which all processes of a machine share."""


@dataclass(frozen=True)
class AgentReport:
    """The agent. The fields below `reason_at` are set in elastic groups only."""

    beats: int = 0
    """Grows every second while the agent runs."""
    reason: str = ""
    reason_at: float = 0.0
    waits_for: str = ""
    members: list[int] = field(default_factory=list)
    """Node 0: the nodes that take part in this attempt."""
    away: list[int] = field(default_factory=list)
    """Node 0: the nodes that were expected and did not come."""
    decided_at: float = 0.0
    """Node 0: time.monotonic() of that decision; 0 before."""
    returning: list[int] = field(default_factory=list)
    """Node 0: the nodes to be taken back, for which the attempt should end."""


Report = TypeVar("Report", RankReport, AgentReport)


class Writer(Generic[Report]):
    """Keep this process's report and write each change; any thread may call `update`."""

    def __init__(self, file: str, report: Report, environment: Mapping[str, str] = os.environ) -> None:
        self.report = report
        self._path = Path(environment.get(FOLDER, "/nowhere"), file)
        self._lock = threading.Lock()

    def update(self, **changes: Any) -> None:
        """Change fields of the report and write it by rename. A full disk must not end the process."""
        with self._lock, contextlib.suppress(OSError):
            self.report = replace(self.report, **changes)
            temporary = self._path.with_suffix(".tmp")
            temporary.write_text(json.dumps(asdict(self.report)))
            temporary.replace(self._path)

    def explain(self, reason: str) -> None:
        """Report why this process ends."""
        self.update(reason=reason, reason_at=time.monotonic())


class Reports:
    """The reports of one attempt with `ranks` ranks on this node, and its exit code and reason."""

    def __init__(self, folder: Path, ranks: int) -> None:
        self._folder, self._ranks = folder, ranks

    @property
    def agent(self) -> AgentReport:
        """The agent's report; an empty one before the agent has written."""
        return AgentReport(**_read(self._folder / "agent.json"))

    @property
    def ranks(self) -> list[RankReport]:
        """The reports of the ranks that have started."""
        return [RankReport(**_read(path)) for path in self._folder.glob("rank-*.json")]

    @property
    def started(self) -> bool:
        """Whether a rank has started, so that all nodes have met."""
        return bool(self.ranks)

    @property
    def exit_codes(self) -> list[int]:
        """Exit codes of the ranks that have ended."""
        return [rank.exit_code for rank in self.ranks if rank.exit_code is not None]

    @property
    def all_done(self) -> bool:
        """Whether every rank of this node has trained to the end."""
        codes = self.exit_codes
        return len(codes) == self._ranks and not any(codes)

    @property
    def reason(self) -> str:
        """Why the attempt ended: the first reason of those with the most serious exit code."""
        found = [(rank.exit_code, rank) for rank in self.ranks if rank.reason]
        found += [(None, agent)] if (agent := self.agent).reason else []
        found.sort(key=lambda each: each[1].reason_at)
        for code in (USER_MISTAKE, LATE, CRASHED, FAILED):
            if reasons := [report.reason for exit_code, report in found if exit_code == code]:
                return reasons[0]
        return found[0][1].reason if found else ""

    def exit_code(self, agent: int | None, stopping: bool, alone: bool) -> int:
        """Return the attempt's exit code, one of those in errors.py; not for an attempt whose ranks are `all_done`.

        Args:
            agent: the agent's exit code; None where it was killed.
            stopping: whether the supervisor was stopped by a signal.
            alone: whether this is the only node, so that no peer can be the cause.
        """
        codes = self.exit_codes
        if USER_MISTAKE in codes or agent == USER_MISTAKE:
            return USER_MISTAKE
        if LATE in codes:
            return LATE
        saved = len(codes) == self._ranks and set(codes) <= {0, PREEMPTED}
        if saved or (stopping and not self.started):
            return PREEMPTED
        if CRASHED in codes or agent == CRASHED:
            return CRASHED
        own = FAILED in codes or (alone and agent is not None and agent >= 0 and PEER_LOST not in codes)
        return FAILED if own else PEER_LOST


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
