"""Time limits of tests follow the machine: each is multiplied by how much slower it is than the one they were set on.

K8SCIFAR_TEST_PATIENCE=3 says it; else it is measured once, by importing torch and multiplying matrices. Never below 1.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from typing import Any

import janitor

VARIABLE = "K8SCIFAR_TEST_PATIENCE"
USUAL = 4.0  # seconds, which two cores with nothing else to do take 2.5 of
POLL = 1.0  # seconds; a shorter wait is not a limit but a look
WORK = "import time, torch; a = torch.ones(512, 512)\nfor _ in range(40): a @ a\nprint(time.monotonic())"
_measuring: subprocess.Popen | None = None
_began = 0.0
_lock = threading.Lock()
_Popen = subprocess.Popen


def begin() -> None:
    """Start to measure, beside what pytest does first."""
    global _measuring, _began
    if VARIABLE not in os.environ and _measuring is None:
        _began = time.monotonic()
        _measuring = _Popen([sys.executable, "-c", WORK], stdout=subprocess.PIPE, text=True)


def factor() -> float:
    """How many times as long as usual a limit is here, at least 1."""
    with _lock:
        if VARIABLE not in os.environ:
            begin()
            assert _measuring is not None
            took = float(_measuring.communicate()[0] or 0) - _began
            os.environ[VARIABLE] = f"{max(1.0, took / USUAL):.2f}"  # workers and what they start have it from here
        try:
            return max(1.0, float(os.environ[VARIABLE]))
        except ValueError:
            raise SystemExit(f"{VARIABLE}={os.environ[VARIABLE]} is no number") from None


def patient(seconds: float) -> float:
    """A limit for this machine."""
    return seconds * factor()


class Popen(_Popen):
    """Every process that a test starts: its limits are for this machine, and it carries the runner's mark."""

    _within = False

    def __init__(self, *args: Any, env: Any = None, **options: Any) -> None:
        if env is not None and janitor.MARK in os.environ:
            env = dict(env) | {janitor.MARK: os.environ[janitor.MARK]}
        super().__init__(*args, env=env, **options)

    def wait(self, timeout: float | None = None) -> int:
        return super().wait(timeout if self._within else _limit(timeout))

    def communicate(self, input: Any = None, timeout: float | None = None) -> tuple[Any, Any]:
        limit, self._within = _limit(timeout), True
        try:
            return super().communicate(input, limit)
        finally:
            self._within = False


def _limit(timeout: float | None) -> float | None:
    return timeout if timeout is None or timeout < POLL else patient(timeout)


def install() -> None:
    """From now on `subprocess` starts such processes."""
    subprocess.Popen = Popen  # type: ignore[misc]
