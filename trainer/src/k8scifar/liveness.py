"""The heartbeat: a file whose age the kubelet's liveness probe reads."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def touch() -> None:
    """Touch the heartbeat file, if the environment variable K8SCIFAR_HEARTBEAT is set."""
    if path := os.environ.get("K8SCIFAR_HEARTBEAT"):
        with contextlib.suppress(OSError):  # a full disk must not end the training
            Path(path).touch()


class Heartbeat:
    """The supervisor's side: it touches the file while no rank trains; a rank touches it at every step."""

    def __init__(self, path: str | None) -> None:
        self.path = Path(path) if path else None
        self._touched_at = 0

    def touch(self) -> None:
        """Touch the file; a full disk must not end the training."""
        if self.path:
            with contextlib.suppress(OSError):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self.path.touch()
                self._touched_at = self.path.stat().st_mtime_ns

    def touch_unless_others(self) -> None:
        """Touch the file unless a rank has touched it: from then on only ranks do, so that a stuck rank is detected."""
        if self.path:
            with contextlib.suppress(OSError):
                if self.path.stat().st_mtime_ns == self._touched_at:
                    self.touch()
