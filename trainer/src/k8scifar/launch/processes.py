"""Start, reap and kill whole process trees.

Uses the standard library only, so that a supervisor that is process 1 of a container stays small. macOS has neither
/proc nor prctl: there ps lists processes, a child polls for its parent each second, and a grandchild whose parent was
killed is not adopted but ends itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36


def _prctl(option: int, value: int) -> bool:
    """Call Linux's prctl(2); False on other systems."""
    if not sys.platform.startswith("linux"):
        return False
    return ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) == 0


def adopt_orphans() -> bool:
    """Become the parent of every orphaned descendant (PR_SET_CHILD_SUBREAPER), so that `descendants` finds it."""
    return _prctl(PR_SET_CHILD_SUBREAPER, 1)


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent dies; end at once if the process `parent` has died already.

    On macOS a thread polls for the parent each second.
    """
    if not _prctl(PR_SET_PDEATHSIG, signal.SIGKILL):
        threading.Thread(target=_watch_parent, args=(os.getppid(),), name="parent", daemon=True).start()
    if parent and os.getppid() != parent:
        os._exit(128 + signal.SIGKILL)


def _watch_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(128 + signal.SIGKILL)


class Child:
    """A child process; `poll` reaps it, and every adopted orphan, as process 1 has to."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        # In a new session a terminal's Ctrl-C reaches only the supervisor, which then lets the ranks save.
        self._popen = subprocess.Popen(command, env=dict(environment), start_new_session=True)
        self.pid = self._popen.pid
        self.code: int | None = None

    def poll(self) -> int | None:
        """Return the exit status (negative: the signal that killed it), or None while the child runs."""
        for pid, status in reap():
            if pid == self.pid:
                self.code = os.waitstatus_to_exitcode(status)
                self._popen.returncode = self.code  # reaped above: Popen must not wait for it again
        return self.code

    def signal(self, number: int) -> None:
        """Send a signal to the child, if it still runs."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill_tree(self, seconds: float = 10.0) -> None:
        """Send SIGKILL to the child and all descendants, also those in other sessions, and wait for their end."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            alive = set(descendants(os.getpid()))
            if self.poll() is None:
                alive.add(self.pid)
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(self.pid, signal.SIGKILL)
            for pid in alive:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
            self.poll()
            if not alive:
                return
            time.sleep(0.02)


def reap() -> list[tuple[int, int]]:
    """Reap every child that has ended; returns (process id, wait status) of each."""
    ended = []
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return ended
        if pid == 0:
            return ended
        ended.append((pid, status))


def descendants(root: int) -> list[int]:
    """Return the process ids of all living descendants of `root`."""
    children: dict[int, list[int]] = {}
    for pid, parent, state in _processes():
        if state[:1] not in "ZX":
            children.setdefault(parent, []).append(pid)
    found, queue = [], [root]
    while queue:
        for pid in children.get(queue.pop(), []):
            found.append(pid)
            queue.append(pid)
    return found


def _processes(proc: Path = Path("/proc")) -> list[tuple[int, int, str]]:
    """Return (id, parent's id, state) of every process of this machine, from /proc or else from ps (macOS)."""
    found = []
    for entry in proc.glob("[0-9]*/stat"):
        try:
            state, parent = entry.read_text().rpartition(")")[2].split()[:2]
        except (OSError, ValueError):
            continue
        found.append((int(entry.parent.name), int(parent), state))
    if found:
        return found
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        lister = subprocess.Popen(["ps", "-A", "-o", "pid=,ppid=,stat="], stdout=subprocess.PIPE, text=True)
        rows = (line.split() for line in lister.communicate(timeout=10)[0].splitlines())
        found = [(int(row[0]), int(row[1]), row[2]) for row in rows if len(row) >= 3 and int(row[0]) != lister.pid]
    return found
