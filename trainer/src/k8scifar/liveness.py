"""The heartbeat: a file whose age the orchestrator's liveness probe reads."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def touch() -> None:
    """Tell the orchestrator's liveness probe that training moves: touch the file K8SCIFAR_HEARTBEAT names, if any."""
    if path := os.environ.get("K8SCIFAR_HEARTBEAT"):
        with contextlib.suppress(OSError):  # a full disk must not end the training
            Path(path).touch()


class Heartbeat:
    """The file whose age a liveness probe reads; the ranks renew it at every step, the supervisor while none trains."""

    def __init__(self, path: str | None) -> None:
        self.path = Path(path) if path else None
        self._mine = 0

    def touch(self) -> None:
        """Renew it; a full disk must not end the training."""
        if self.path:
            with contextlib.suppress(OSError):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self.path.touch()
                self._mine = self.path.stat().st_mtime_ns

    def touch_unless_others(self) -> None:
        """Renew it until a rank does so for the first time: from then on its age is the ranks' alone."""
        if self.path:
            with contextlib.suppress(OSError):
                if self.path.stat().st_mtime_ns == self._mine:
                    self.touch()
