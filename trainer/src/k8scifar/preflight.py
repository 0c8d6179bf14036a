"""Check what training on several machines needs, before it starts, and say in one line what to do.

Exit codes, one for each check: 10 this pod's name, 11 node 0's name, 12 the network interface, 13 /dev/shm, 14 the
data set's volume can't be written, 15 the checkpoints' volume can't, 16 too little space, 17 the volume loses files,
18 the volume is not the one the other pods see, 19 the pods see different data.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import os
import re
import secrets
import socket
import sys
import time
from pathlib import Path

from k8scifar import completion, launch, network, settings
from k8scifar.address import local
from k8scifar.errors import TrainingError, UserError
from k8scifar.files import sync_folder, write_atomically

OWN_NAME, NODE_0, INTERFACE, SHM, DATA_VOLUME, RUNS_VOLUME, SPACE, LOST, NOT_SHARED, OTHER_DATA = range(10, 20)
MARKS = ".preflight"
FULL = (errno.ENOSPC, errno.EDQUOT)
SMALL_SHM = 32  # MiB; container engines give 64 where nothing is asked for


class Problem(Exception):
    """A check that failed: its exit code, and one line that says what to do."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("--nnodes", type=int, default=1, metavar="N", help="machines that train together (1)")
    parser.add_argument("--node-rank", type=int, metavar="R", help="which machine this is (in a pod: its index)")
    parser.add_argument("--master-addr", default="", metavar="NAME", help="host name of machine 0")
    parser.add_argument(
        "--wait", type=float, default=300.0, metavar="SECONDS", help="how long to wait for others (300)"
    )
    parser.add_argument("--data-dir", type=local, default=Path("data"), metavar="DIR", help="folder of the data set")
    parser.add_argument("--runs-dir", type=local, default=Path("runs"), metavar="DIR", help="folder of the run folders")
    parser.add_argument("--min-free", type=int, default=512, metavar="MIB", help="free space of each volume, MiB (512)")
    parser.add_argument("--interface", default="", metavar="NAME", help="network interface of the collectives")
    parser.add_argument("--config", metavar="FILE", help="settings of the run; one that is finished needs no peers")
    parser.add_argument("--only-data", action="store_true", help="check only that all machines see the same data")


def run(args: argparse.Namespace) -> int:
    """Run the checks, stop at the first that fails; returns its exit code, 0 where none does. Raises UserError."""
    rank = args.node_rank if args.node_rank is not None else launch.node_rank(args.nnodes, os.environ)
    try:
        if args.only_data:
            check_data(args.data_dir, args.runs_dir, rank, args.wait)
        else:
            check_interface(args.interface)
            check_shm()
            check_volume(args.data_dir, DATA_VOLUME, "dataset", args.min_free)
            check_volume(args.runs_dir, RUNS_VOLUME, "checkpoints", args.min_free)
            if args.nnodes > 1 and not _is_finished(args):
                check_names(args.master_addr, rank, args.wait, args.interface)
                check_shared(args.data_dir, "dataset", rank, args.wait)
                check_shared(args.runs_dir, "checkpoints", rank, args.wait)
    except Problem as problem:
        line = f"k8scifar: preflight: {problem}"
        print(line, file=sys.stderr, flush=True)
        completion.leave_message(line, os.environ)
        return problem.code
    print(f"k8scifar: preflight: node {rank} of {args.nnodes} is ready", file=sys.stderr)
    return 0


def check_interface(name: str, interfaces: Path = Path("/sys/class/net")) -> None:
    """Raise Problem where the named interface is not there."""
    if not name or not interfaces.is_dir():
        return
    there = sorted(entry.name for entry in interfaces.iterdir())
    if name not in there:
        raise Problem(
            INTERFACE,
            f"there is no network interface {name}; set train.distributed.interface to one of {', '.join(there)}, "
            'or to "" to have it chosen',
        )


def check_shm(folder: Path = Path("/dev/shm")) -> None:
    """Raise Problem where shared memory is missing, read-only or tiny."""
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
        raise Problem(LOST, f"{folder} gave back other bytes than were written: the {name} volume is not to be trusted")
    if (mib := free.f_bavail * free.f_frsize >> 20) < min_free:
        raise Problem(
            SPACE, f"{folder} has {mib} MiB free of the {min_free} wanted: free some, or lower preflight.freeMiB"
        )


def check_names(master: str, rank: int, wait: float, interface: str = "") -> None:
    """Wait for this pod's own name and node 0's to resolve. Raises Problem."""
    first, _, rest = master.partition(".")
    own = f"{re.sub(r'-0$', f'-{rank}', first)}.{rest}" if rest and first.endswith("-0") else ""
    for name, code, who in ((own, OWN_NAME, "this pod's own name"), (master, NODE_0, "node 0's name")):
        if name and not _wait(lambda name=name: bool(network.resolve(name)), wait, f"{name} to resolve"):
            raise Problem(code, f"{who} {name} does not resolve (waited {wait:.0f} s); {_name_advice(name)}")
    here = network.resolve(socket.gethostname())
    if here and not interface and all(_is_loopback(address) for address in here):
        raise Problem(
            OWN_NAME,
            f"the host name {socket.gethostname()} resolves to the loopback address only, so the peers can't connect "
            "back; set train.distributed.interface to the interface that reaches them",
        )


def check_shared(folder: Path, name: str, rank: int, wait: float) -> None:
    """Leave this node's mark and wait to see node 0's. Raises Problem."""
    marks = folder / MARKS
    try:
        marks.mkdir(exist_ok=True)
        write_atomically(marks / f"node-{rank}", f"{socket.gethostname()}\n".encode())
    except OSError as error:
        raise Problem(LOST, _advice(folder, name, error)) from None
    if not _wait(lambda: "node-0" in os.listdir(marks), wait, f"node 0's mark in {marks}"):
        raise Problem(
            NOT_SHARED,
            f"node 0 has left no mark in {marks} within {wait:.0f} s: either its pod does not run (kubectl "
            f"describe it), or the {name} volume here is not the one it has: a hostPath is not shared",
        )


def check_data(data_dir: Path, runs_dir: Path, rank: int, wait: float) -> None:
    """Wait to see the same data set as node 0 says it sees. Raises Problem."""
    from k8scifar.data import packed

    mark = runs_dir / MARKS / "data"
    mine = ""

    def agree() -> bool:
        nonlocal mine
        try:
            manifest = packed.read_manifest(data_dir)
        except (UserError, TrainingError):
            manifest = None
        mine = manifest.fingerprint if manifest else "none"
        if rank == 0 and manifest:
            mark.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(mark, mine.encode())
        return manifest is not None and _read(mark) == mine

    try:
        if _wait(agree, wait, f"the data that node 0 has ({mark})"):
            return
    except OSError as error:
        raise Problem(LOST, _advice(runs_dir, "checkpoints", error)) from None
    raise Problem(
        OTHER_DATA,
        f"this pod sees data set {mine} in {data_dir}, node 0 sees {_read(mark) or 'none'}: both must mount one "
        "dataset volume",
    )


def _is_finished(args: argparse.Namespace) -> bool:
    """Whether the run is done: then node 0 may be gone for good, and nobody has to wait for it."""
    config = settings.load(args.config, [f"runs_dir={json.dumps(str(args.runs_dir))}"])
    return completion.finished(config) is not None


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


def _name_advice(name: str, resolver: Path = Path("/etc/resolv.conf")) -> str:
    with contextlib.suppress(OSError):
        domains = re.findall(r"\bsvc\.(\S+)", resolver.read_text())
        if domains and ".svc." in name and not name.endswith(f".svc.{domains[0]}"):
            return f"this cluster's domain is {domains[0]}: set clusterDomain={domains[0]}"
    return "is node 0's pod scheduled, does the headless Service exist, and does cluster DNS answer?"


def _wait(ready, seconds: float, what: str) -> bool:
    start, said = time.monotonic(), False
    while not ready():
        waited = time.monotonic() - start
        if waited >= seconds:
            return False
        if waited > 5 and not said:
            print(f"k8scifar: preflight: waiting up to {seconds:.0f} s for {what}", file=sys.stderr, flush=True)
            said = True
        time.sleep(0.5)
    return True


def _is_loopback(address: str) -> bool:
    return address.startswith("127.") or address == "::1"


def _size_mib(folder: Path) -> int:
    status = os.statvfs(folder)
    return status.f_blocks * status.f_frsize >> 20


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
