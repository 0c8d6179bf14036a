"""Whose a run folder is: the release that made it (owner.json), and the training that writes in it now (.lock, lease).

Two users with one NFS export, or two terminals, must not train in one folder: the second is refused, with a line that
names the first, before anything is changed.
"""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path
from typing import BinaryIO

from k8scifar import files
from k8scifar.errors import PeerLost, UserError
from k8scifar.results import lease

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

OWNER, LOCK = "owner.json", ".lock"
RELEASE = "K8SCIFAR_RELEASE"  # environment variable: namespace/name of the release, in a pod
GRACE = 5.0  # seconds that a training which is just ending gets to let go of the folder

_held: dict[Path, BinaryIO] = {}


def check_owner(run_dir: Path, adopt: bool) -> None:
    """Raise UserError where another release made the folder, unless it is to be adopted; outside a pod never.

    Raises OSError where the folder can't be read.
    """
    ours, owner = os.environ.get(RELEASE, ""), _read(run_dir / OWNER).get("release", "")
    if ours and "/" in owner and owner != ours and not adopt:
        raise UserError(
            f"run folder {run_dir} belongs to release {_named(owner)}, and this is release {_named(ours)}; give this "
            "one a name of its own (train.name), or set train.checkpoint.adopt=true to go on with that training"
        )


def take(run_dir: Path, adopt: bool) -> None:
    """Make the folder this training's: write its owner, hold its lock until `leave`, or until this process ends.

    Where a file system has no locks, the lease alone tells who came last. Raises UserError (another's folder, another
    training; Superseded: another pod came after this one), PeerLost (another pod of this release still holds it) and
    OSError.
    """
    check_owner(run_dir, adopt)
    if run_dir not in _held:
        file = open(run_dir / LOCK, "a+b")  # noqa: SIM115 (held open on purpose)
        try:
            _lock(file, run_dir)
            lease.take(run_dir)
        except BaseException:
            file.close()
            raise
        _held[run_dir] = file
    release = os.environ.get(RELEASE, "")
    if release and _read(run_dir / OWNER).get("release") != release:
        files.write_atomically(run_dir / OWNER, json.dumps({"release": release}).encode())


def leave() -> None:
    """Let go of every folder that this process holds."""
    lease.leave()
    while _held:
        _held.popitem()[1].close()


def _lock(file: BinaryIO, run_dir: Path) -> None:
    end = time.monotonic() + GRACE
    while fcntl is not None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() > end:
                raise _taken(run_dir) from None
            time.sleep(0.2)
        except OSError:  # no locks on this mount
            break
    about = {
        "process": os.getpid(),
        "host": socket.gethostname(),
        "pod": os.environ.get("POD_NAME", ""),
        "release": os.environ.get(RELEASE, ""),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    file.truncate(0)
    file.write(json.dumps(about).encode())
    file.flush()


def _taken(run_dir: Path) -> UserError | PeerLost:
    """What to say of a folder in which somebody trains."""
    who, here = _read(run_dir / LOCK), os.environ.get(RELEASE, "")
    since = f" since {who['since']}" if who.get("since") else ""
    if here and who.get("release") in (here, "", None):
        return PeerLost(f"run folder {run_dir} is still held by {who.get('pod') or 'another pod'}{since}")
    name = f"process {who['process']} of {who['host']}" if who.get("process") else "another process"
    if who.get("release"):
        name = f"pod {who['pod']} of release {_named(who['release'])}"
    return UserError(
        f"run {run_dir} is being trained by {name}{since}; wait for its end, stop it, or give this run another name "
        "(NAME= of make, --name)"
    )


def _named(release: str) -> str:
    namespace, _, name = release.partition("/")
    return f"{name} in namespace {namespace}" if name else release


def _read(path: Path) -> dict[str, str]:
    """The JSON object in a small file, its values as text; empty where there is none. Raises OSError."""
    try:
        values = json.loads(files.read(path))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return {}
    return {key: str(value) for key, value in values.items()} if isinstance(values, dict) else {}
