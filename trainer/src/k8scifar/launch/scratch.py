"""What an attempt leaves for the supervisor: the ranks' exit codes and reasons, and torchrun's signs of life.

worker.py, agent.py and cli.py write these files; this reads them.
"""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path
from typing import Any

from k8scifar.errors import CRASHED, FAILED, LATE, PEER_LOST, PREEMPTED, USER_MISTAKE


class Scratch:
    """The folder of one attempt of `ranks` ranks on this node."""

    def __init__(self, path: Path, ranks: int) -> None:
        self.path, self._ranks = path, ranks

    @property
    def exit_codes(self) -> list[int]:
        """Exit codes of the ranks that have ended."""
        texts = [path.read_text() for path in sorted(self.path.glob("exit.*"))]
        return [int(text) for text in texts if text]

    @property
    def all_done(self) -> bool:
        """Whether every rank of this node has trained to the end."""
        codes = self.exit_codes
        return len(codes) == self._ranks and not any(codes)

    @property
    def joined(self) -> bool:
        """Whether a rank was started: all nodes have met."""
        return any(self.path.glob("started.*"))

    @property
    def called(self) -> dict[str, Any]:
        """Of an elastic group, on node 0: who takes part (members), who was gone for long (gone), since when (at)."""
        return json.loads(_read(self.path / "called") or "{}")

    @property
    def welcome(self) -> list[int]:
        """Of an elastic group, on node 0: nodes to be taken back, for which the others should meet anew."""
        return json.loads(_read(self.path / "welcome") or "[]")

    @property
    def waits_for(self) -> str:
        """What the agent of an elastic group waits for."""
        return _read(self.path / "waiting")

    def call(self, members: list[int], gone: list[int]) -> None:
        """Tell the supervisor who takes part; `at` is time.monotonic(), which all processes share."""
        self._write("called", json.dumps({"members": members, "gone": gone, "at": time.monotonic()}))

    def welcome_back(self, nodes: list[int]) -> None:
        """Tell the supervisor who is back."""
        self._write("welcome", json.dumps(nodes))

    def wait_for(self, text: str) -> None:
        """Tell the supervisor what is waited for."""
        if text != self.waits_for:
            self._write("waiting", text)

    def _write(self, name: str, text: str) -> None:
        with contextlib.suppress(OSError):
            (self.path / f".{name}").write_text(text)
            (self.path / f".{name}").replace(self.path / name)

    @property
    def alive(self) -> int:
        """When torchrun last showed a sign of life, ns; 0 before the first."""
        try:
            return (self.path / "alive").stat().st_mtime_ns
        except OSError:
            return 0

    @property
    def reason(self) -> str:
        """Why the attempt ended; what a rank did by itself comes before what it says of others."""
        reasons = sorted(self.path.glob("reason.*"), key=lambda path: path.stat().st_mtime)
        for kind in (USER_MISTAKE, LATE, CRASHED, FAILED, None):
            for path in reasons:
                text = _read(path)
                if text and (kind is None or _read(path.with_name(f"exit{path.suffix}")) == str(kind)):
                    return text
        return ""

    def judge(self, code: int | None, stopping: bool, alone: bool) -> int:
        """The attempt's exit code, of those in errors.py; not for an attempt whose ranks are `all_done`.

        Args:
            code: torchrun's own; None: it was ended by force.
            stopping: whether the supervisor was told to stop.
            alone: whether this is the only node, so that no other can be blamed.
        """
        codes = self.exit_codes
        if USER_MISTAKE in codes or code == USER_MISTAKE:
            return USER_MISTAKE
        if LATE in codes:
            return LATE
        saved = len(codes) == self._ranks and set(codes) <= {0, PREEMPTED}
        if saved or (stopping and not self.joined):
            return PREEMPTED
        if CRASHED in codes or code == CRASHED:
            return CRASHED
        own = FAILED in codes or (alone and code is not None and code >= 0 and PEER_LOST not in codes)
        return FAILED if own else PEER_LOST


def _read(path: Path) -> str:
    try:
        return " ".join(path.read_text().split())
    except OSError:
        return ""
