"""Ends what a test started once its runner has ended, also where that was killed: processes, networks, mounts.

`start()` gives the runner (pytest, one of its workers, or chaos.py) a janitor: a process of its own session that reads
from a pipe. The pipe closes when the runner ends, however that comes; then the janitor looks for the runner's mark in
the environment of every process. What a dead runner without a janitor left is swept when the next one starts.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

MARK = "K8SCIFAR_TEST_RUNNER"
OWNER = ".k8scifar-runner"  # a file in a runner's folder: whose it is
# The throw-away engine cleans up by itself when it is asked to end; its parts must live for that.
ENGINE = re.compile(r"with-engine\.sh|docker|containerd|\brunc\b|k8scifar-engine")
ENGINE_SECONDS = 240  # it removes gigabytes
COMMAND_SECONDS = 5  # for the command that it was started for, which may end by itself
_SPACE = re.compile(r"k8scifar-(\d+)-")
_pipe: int | None = None


def mark(pid: int | None = None) -> str:
    """What names a process for good: its id and when it started; empty for one that is not there."""
    with contextlib.suppress(OSError, IndexError):
        pid = pid or os.getpid()
        return f"{pid}:{Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[19]}"
    return ""


def start() -> None:
    """Mark what this process starts from now on, and have it ended with it."""
    global _pipe
    if _pipe is not None or not sys.platform.startswith("linux"):
        return
    sweep()
    os.environ.pop(MARK, None)  # a worker has its starter's
    ours, _pipe = os.pipe()
    command = [sys.executable, "-I", __file__, mark()]
    nothing = subprocess.DEVNULL
    subprocess.Popen(command, stdin=ours, stdout=nothing, stderr=nothing, start_new_session=True, cwd="/")
    os.close(ours)
    os.environ[MARK] = mark()


def own(folder: Path) -> None:
    """Mounts in this folder are the runner's."""
    if _pipe is not None:
        (folder / OWNER).write_text(mark())
        os.write(_pipe, f"{folder}\n".encode())


def sweep() -> None:
    """End what runners left that are dead, and so are their janitors."""
    dead = lambda found: bool(found) and mark(int(found.partition(":")[0])) != found  # noqa: E731
    for pid, found in marked().items():
        if dead(found) and not ENGINE.search(command_line(pid)):
            kill(pid)
    for space in spaces():
        if not Path(f"/proc/{_SPACE.match(space)[1]}").exists():
            remove_space(space)
    unmount(lambda at: any(dead(owner(folder)) for folder in at.parents))


def clean(runner: str, folders: list[str]) -> None:
    """End what this runner left."""
    asked: set[int] = set()
    first: set[int] = set()
    began = time.monotonic()
    while found := {pid for pid, whose in marked().items() if whose == runner and pid != os.getpid()}:
        passed = time.monotonic() - began
        first = first or found
        scripts = {pid for pid in found if "with-engine.sh" in command_line(pid)}
        engines = {pid for pid in scripts if not scripts & ancestors(pid)}  # but for what the shell forks
        spared = set(engines)
        for pid in found - engines if engines and passed < ENGINE_SECONDS else ():
            late = passed > COMMAND_SECONDS and pid in first  # not one that cleans up
            if ENGINE.search(command_line(pid)) or (engines & ancestors(pid) and not late):
                spared.add(pid)
        for pid in found - (spared if passed < ENGINE_SECONDS else set()):
            kill(pid)
        for pid in engines - asked:
            asked.add(pid)
            kill(pid, signal.SIGTERM)
        time.sleep(0.05)
    for space in spaces():
        if _SPACE.match(space)[1] == runner.partition(":")[0]:
            remove_space(space)
    unmount(lambda at: any(str(at).startswith(folder.rstrip("/") + "/") for folder in folders))


def marked() -> dict[int, str]:
    """Processes that have a mark -> whose it is."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                for word in (entry / "environ").read_bytes().split(b"\0"):
                    if word.startswith(MARK.encode() + b"="):
                        found[int(entry.name)] = word.decode().partition("=")[2]
    return found


def ancestors(pid: int) -> set[int]:
    """The processes that a process comes from."""
    found: set[int] = set()
    with contextlib.suppress(OSError, IndexError):
        while pid > 1:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
            found.add(pid)
    return found


def command_line(pid: int) -> str:
    """Words of a process's command line; empty for one that has ended."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return ""


def kill(pid: int, number: int = signal.SIGKILL) -> None:
    """Send a signal to a process that may have ended."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)


def spaces() -> list[str]:
    """The network namespaces of any runner."""
    with contextlib.suppress(OSError):
        return [path.name for path in Path("/run/netns").iterdir() if _SPACE.match(path.name)]
    return []


def remove_space(space: str) -> None:
    """Kill what runs in a network namespace, and remove it with its files."""
    while pids := subprocess.run(["ip", "netns", "pids", space], capture_output=True, text=True).stdout.split():
        for pid in pids:
            kill(int(pid))
        time.sleep(0.05)
    subprocess.run(["ip", "netns", "delete", space], capture_output=True)
    shutil.rmtree(Path("/etc/netns") / space, ignore_errors=True)


def owner(folder: Path) -> str:
    """Whose a folder is, if it is a runner's."""
    with contextlib.suppress(OSError):
        return (folder / OWNER).read_text()
    return ""


def unmount(ours: Callable[[Path], bool]) -> None:
    """Unmount what is mounted at such places, the innermost first."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/self/mounts").read_text().splitlines()
        places = [Path(re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), line.split()[1])) for line in lines]
        for at in sorted(filter(ours, places), reverse=True):
            subprocess.run(["umount", "--lazy", str(at)], capture_output=True)


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    clean(sys.argv[1], sys.stdin.read().split("\n")[:-1])  # the pipe ends with the runner
