"""Signals that end a sleep, and intervals."""

from __future__ import annotations

import signal
import time

POLL = 0.1  # seconds between two looks at what may have changed


class Signals:
    """Counts the signals that stop this process."""

    def __init__(self) -> None:
        self.count = 0

    def install(self) -> None:
        """Count SIGTERM, SIGINT and SIGHUP from now on."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._count)

    def _count(self, *_: object) -> None:
        self.count += 1

    def sleep(self, seconds: float) -> None:
        """Sleep until the time is over or a signal has come."""
        end = time.monotonic() + seconds
        while not self.count and (left := end - time.monotonic()) > 0:
            time.sleep(min(POLL, left))


class Every:
    """An interval: `due` returns True at its first call, then at most once in so many seconds."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._next = seconds, 0.0

    def due(self) -> bool:
        """Return whether the interval is over, and begin the next one."""
        now = time.monotonic()
        if now < self._next:
            return False
        self._next = now + self._seconds
        return True
