"""Who trains in a run folder now: a lease, whose number each taker raises by one, so that a late one can tell.

``.lease/00000007.json`` says who took number 7. It is made exclusively (O_EXCL), which NFS keeps without locks: no two
takers have one number. Whoever holds the highest trains; everyone else is late, and stops before it writes. A listing
is asked of the server each time that the folder is opened, so a new number is seen at once by other clients too.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
import uuid
from pathlib import Path

from k8scifar import files
from k8scifar.errors import Superseded

FOLDER = ".lease"
HOLDER = "K8SCIFAR_HOLDER"  # environment variable: who starts the ranks of attempt after attempt
KEPT = 50  # former holders that are remembered, so that none of them takes the lease back
OURS = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"  # of a process that nobody named

_held: dict[Path, int] = {}


def holder() -> str:
    """What stays the same from attempt to attempt: the pod's uid, else the supervisor's name, else this process's."""
    return os.environ.get("POD_UID") or os.environ.get(HOLDER) or OURS


def take(run_dir: Path) -> None:
    """Take the next number; whoever holds a lower one is late from now on.

    On a full disk nothing can be taken: then only a higher number than those there are makes this process late. Raises
    Superseded where another holder took the lease from this one before, and OSError.
    """
    folder, number = run_dir / FOLDER, 0
    try:
        files.make_folder(folder)
        while True:
            leases = check_holder(run_dir)
            number = max(leases, default=0)
            with contextlib.suppress(FileExistsError):
                _make(folder / f"{number + 1:08d}.json")
                number += 1
                break
        _forget(folder, leases)
    except OSError as error:
        if error.errno not in files.FULL:
            raise
    _held[run_dir] = number


def check_holder(run_dir: Path) -> dict[int, dict[str, str]]:
    """Raise Superseded where another holder took the lease from this one; returns who took each number.

    Raises OSError where the folder can't be read.
    """
    leases = _read(run_dir / FOLDER)
    newest = leases[max(leases)] if leases else {}
    if newest.get("holder") not in (holder(), None) and holder() in [about.get("holder") for about in leases.values()]:
        raise Superseded(f"{_taken(run_dir, newest)}; it was this one's before, which is late, and stops")
    return leases


def check(run_dir: Path) -> None:
    """Raise Superseded where another process has taken the lease since `take`; a process that took none may write.

    Raises OSError where the folder can't be read.
    """
    if (number := _held.get(run_dir)) is not None and (newest := max(_numbers(run_dir / FOLDER), default=0)) > number:
        about = _about(run_dir / FOLDER, newest)
        raise Superseded(
            f"{_taken(run_dir, about)} (lease {newest}, this process has {number}); this process is late: it stops, "
            "and writes nothing more"
        )


def leave() -> None:
    """Forget what this process has taken; the number stays taken."""
    _held.clear()


def _taken(run_dir: Path, about: dict[str, str]) -> str:
    name = f"process {about['process']} of {about['host']}" if about.get("process") else "another process"
    if about.get("pod"):
        name = f"pod {about['pod']} (uid {about['holder']})"
    return f"run folder {run_dir} is trained by {name}{' since ' + about['since'] if about.get('since') else ''}"


def _make(path: Path) -> None:
    """Make the file with who we are in it. Raises FileExistsError where another was first, and OSError."""
    about = {
        "holder": holder(),
        "process": os.getpid(),
        "host": socket.gethostname(),
        "pod": os.environ.get("POD_NAME", ""),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        os.write(descriptor, json.dumps(about).encode())
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    files.sync_folder(path.parent)  # a number that a power cut took back would make a late holder the newest again


def _numbers(folder: Path) -> list[int]:
    return [int(name[:8]) for name in files.names(folder) if name[:8].isdigit() and name.endswith(".json")]


def _read(folder: Path) -> dict[int, dict[str, str]]:
    """Number -> who took it, lowest first. Raises OSError."""
    return {number: _about(folder, number) for number in sorted(_numbers(folder))}


def _about(folder: Path, number: int) -> dict[str, str]:
    """Who took a number; empty where that can't be told (a crash or a full disk cut it short)."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        values = json.loads(files.read(folder / f"{number:08d}.json"))
        return {key: str(value) for key, value in values.items()} if isinstance(values, dict) else {}
    return {}


def _forget(folder: Path, leases: dict[int, dict[str, str]]) -> None:
    """Remove former leases, but for the last one of each of the last holders."""
    last = {about.get("holder"): number for number, about in leases.items()}
    kept = sorted(last.values())[-KEPT:]
    for number in leases.keys() - set(kept):
        (folder / f"{number:08d}.json").unlink(missing_ok=True)
