"""Read and write files on storage that may be slow, full or away for a while; no reader sees half a file."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

# Errors of network storage while a server restarts, a handle is stale or a soft mount has timed out.
TRANSIENT = frozenset({errno.ESTALE, errno.EIO, errno.EAGAIN, errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTDOWN})
FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
PAUSES = (0.1, 0.3, 1.0, 3.0, 10.0)  # seconds between tries


def patiently(action: Callable[[], T]) -> T:
    """Return the result of `action`; after a TRANSIENT error retry, with PAUSES between.

    Raises the last OSError, and any other error at once.
    """
    for pause in PAUSES:
        try:
            return action()
        except OSError as error:
            if error.errno not in TRANSIENT:
                raise
        time.sleep(pause)
    return action()


def read(path: Path) -> bytes:
    """Return the content of a file; retries. Raises OSError."""
    return patiently(path.read_bytes)


def names(folder: Path) -> list[str]:
    """Return the names in a folder, none where the folder is missing; retries. Raises OSError."""
    try:
        return patiently(lambda: os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []


def write_atomically(path: Path, content: bytes | memoryview, before: Callable[[], None] = lambda: None) -> None:
    """Write `content` to a temporary file in the same folder, fsync, rename it to `path`, fsync the folder; retries.

    A reader, also after a crash, sees the old content or the new. `before` is called just before the rename. Raises
    OSError, and what `before` raises; `path` is then unchanged and no temporary file is left.
    """
    patiently(lambda: _write(path, content, before))


def _write(path: Path, content: bytes | memoryview, before: Callable[[], None]) -> None:
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp's 0600 would hide the file from TensorBoard's user
        before()
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    sync_folder(path.parent)


def make_folder(path: Path) -> None:
    """Make a folder and its missing parents, fsynced so that they survive a power cut. Raises OSError."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        sync_folder(path.parent)


def unwritten(what: Path | str, error: Exception) -> str:
    """Return the error text for a file that could not be written."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else error
    advice = "free space" if getattr(error, "errno", None) in FULL else "look at its volume"
    return f"{what} could not be written ({reason}); {advice}"


def remove_temporary(folder: Path) -> None:
    """Remove temporary files of killed processes; only for the one process that writes in `folder`."""
    with contextlib.suppress(OSError):
        for name in os.listdir(folder):
            if name.startswith(".") and name.endswith(".tmp"):
                with contextlib.suppress(OSError):
                    os.unlink(folder / name)


def sync_folder(folder: Path) -> None:
    """fsync a folder, so that a rename in it survives a power cut; an error is ignored."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Hold an advisory lock on `path` (created if missing), across hosts where the file system supports it.

    Yields whether it is held: some NFS mounts have no locks, and the caller must be correct without one. The kernel
    releases it when the process dies.
    """
    with open(path, "a+b") as file:
        held = False
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
            held = True
        yield held
