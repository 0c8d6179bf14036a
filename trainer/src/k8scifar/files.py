"""Files on storage that may be slow, full or gone for a while, and are never seen half written."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

T = TypeVar("T")

# What network storage answers while a server restarts, a handle has grown stale or a soft mount has timed out.
TRANSIENT = frozenset({errno.ESTALE, errno.EIO, errno.EAGAIN, errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTDOWN})
FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
PAUSES = (0.1, 0.3, 1.0, 3.0, 10.0)  # seconds between tries


def patiently(action: Callable[[], T]) -> T:
    """What `action` returns; tried again, after PAUSES, while it fails as network storage does for a while.

    Raises the last OSError; one that is not TRANSIENT at once.
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
    """The content of a file, read patiently. Raises OSError."""
    return patiently(path.read_bytes)


def names(folder: Path) -> list[str]:
    """Names in a folder, read patiently; none where there is no such folder. Raises OSError."""
    try:
        return patiently(lambda: os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []


def write_atomically(path: Path, content: bytes | memoryview, before: Callable[[], None] = lambda: None) -> None:
    """Write `content` to a temporary name in the same folder, fsync, rename over `path`, fsync the folder; patiently.

    A reader, or a crash, meets the old content or the new and never a part. Raises OSError, and what `before`, which is
    called just before the rename, raises; then `path` is as it was and nothing temporary is left.
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
    """Make a folder, and those above it that are missing, under names that survive a power cut. Raises OSError."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        sync_folder(path.parent)


def unwritten(what: Path | str, error: Exception) -> str:
    """What to say of a file that could not be written."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else error
    advice = "free space" if getattr(error, "errno", None) in FULL else "look at its volume"
    return f"{what} could not be written ({reason}); {advice}"


def remove_temporary(folder: Path) -> None:
    """Remove what a killed process left of its writes in `folder`; only for the one who alone writes there."""
    with contextlib.suppress(OSError):
        for name in os.listdir(folder):
            if name.startswith(".") and name.endswith(".tmp"):
                with contextlib.suppress(OSError):
                    os.unlink(folder / name)


def sync_folder(folder: Path) -> None:
    """fsync a folder, so that a rename in it survives a power cut; ignored where folders can't be synced."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Hold an advisory lock on `path` (created if missing), across hosts where the file system supports it.

    Yields whether it is held: some NFS mounts have no locks, and the caller must be right without one. The kernel
    lets go of it when the process dies.
    """
    with open(path, "a+b") as file:
        held = False
        if fcntl is not None:
            with contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
                held = True
        yield held
