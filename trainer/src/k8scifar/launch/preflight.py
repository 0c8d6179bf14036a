"""Check this machine before a training starts, and log one line with what to do.

No check waits for another machine; the supervisor does, in a container that is Ready meanwhile.

Exit codes, one for each check: 12 the network interface, 13 /dev/shm, 14 the data set's volume can't be written, 15 the
checkpoints' volume can't be written, 16 too little space, 17 the volume loses files.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import secrets
import socket
from pathlib import Path

from k8scifar import machine
from k8scifar.console import say
from k8scifar.errors import UserError
from k8scifar.files import FULL, sync_folder, write_atomically
from k8scifar.launch.termination import write_message
from k8scifar.urls import local

INTERFACE, SHM, DATA_VOLUME, RUNS_VOLUME, SPACE, LOST = range(12, 18)
SMALL_SHM = 32  # MiB; the default of container engines is 64


class Problem(Exception):
    """A check that failed: its exit code, and one line with what to do."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("--data-dir", type=local, default=Path("data"), metavar="DIR", help="folder of the data set")
    parser.add_argument("--runs-dir", type=local, default=Path("runs"), metavar="DIR", help="folder of the run folders")
    parser.add_argument("--min-free", type=int, default=512, metavar="MIB", help="free space of each volume, MiB (512)")
    parser.add_argument("--interface", default="", metavar="NAME", help="network interface of the collectives")


def run(args: argparse.Namespace) -> int:
    """Run the checks; returns the exit code of the first that fails, or 0."""
    try:
        check_interface(args.interface)
        check_shm()
        check_volume(args.data_dir, DATA_VOLUME, "dataset", args.min_free)
        check_volume(args.runs_dir, RUNS_VOLUME, "checkpoints", args.min_free)
    except Problem as problem:
        line = f"k8scifar: preflight: {problem}"
        say(line)
        write_message(line, os.environ)
        return problem.code
    say("k8scifar: preflight: this machine is ready")
    return 0


def check_interface(name: str) -> None:
    """Raise Problem where this machine has no such interface."""
    try:
        machine.check_interface(name, "train.distributed.interface")
    except UserError as error:
        raise Problem(INTERFACE, str(error)) from None


def check_shm(folder: Path = Path("/dev/shm")) -> None:
    """Raise Problem where shared memory is missing, read-only or too small."""
    try:
        with open(folder / f"k8scifar-{secrets.token_hex(4)}", "wb") as file:
            os.unlink(file.name)
            file.write(b"k8scifar")
        size = _size_mib(folder)
    except OSError as error:
        raise Problem(SHM, f"{folder} can't be written ({error.strerror}); mount a memory emptyDir there") from None
    if size < SMALL_SHM:
        raise Problem(SHM, f"{folder} has {size} MiB; set sharedMemorySize to 64Mi or more (NCCL needs it)")


def check_volume(folder: Path, code: int, name: str, min_free: int) -> None:
    """Make `folder`, then write, sync, rename and read a file in it. Raises Problem."""
    probe = folder / f".preflight-{socket.gethostname()}-{secrets.token_hex(4)}"
    content = secrets.token_bytes(4096)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = os.statvfs(folder)
        write_atomically(probe, content)
        read, moved = probe.read_bytes(), probe.with_suffix(".moved")
        os.rename(probe, moved)
        sync_folder(folder)
        kept = moved.read_bytes()
        moved.unlink()
    except OSError as error:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)
        code = SPACE if error.errno in FULL else code
        raise Problem(code, _advice(folder, name, error)) from None
    if read != content or kept != content:
        raise Problem(LOST, f"{folder} returned other bytes than were written: do not use the {name} volume")
    if (mib := free.f_bavail * free.f_frsize >> 20) < min_free:
        raise Problem(
            SPACE, f"{folder} has {mib} MiB free of the {min_free} wanted: free some, or lower preflight.freeMiB"
        )


def _advice(folder: Path, name: str, error: OSError) -> str:
    if error.errno in (errno.EACCES, errno.EPERM):
        there = next(path for path in (folder, *folder.parents) if path.exists())
        owner = there.stat()
        return (
            f"user {os.getuid()}:{os.getgid()} can't write in {there} of the {name} volume, owned by "
            f"{owner.st_uid}:{owner.st_gid}, mode {owner.st_mode & 0o777:o}: on the server, chown "
            f"{os.getuid()}:{os.getgid()} the exported folder, or set user.uid and user.gid to its owner"
        )
    if error.errno == errno.EROFS:
        return f"{folder} is mounted read-only: export and mount the {name} volume for writing"
    if error.errno in FULL:
        return f"{folder} is full ({error.strerror}): free some space on the {name} volume"
    return f"{folder} of the {name} volume can't be used: {error.strerror}; look at the volume's server"


def _size_mib(folder: Path) -> int:
    status = os.statvfs(folder)
    return status.f_blocks * status.f_frsize >> 20
