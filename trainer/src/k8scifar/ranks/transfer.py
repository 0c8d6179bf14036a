"""Send files from one rank to others over the ranks' connections: in pieces, verified, and resumable."""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
import torch.distributed as dist

from k8scifar import files, liveness
from k8scifar.console import say
from k8scifar.errors import PeerLost, TrainingError, UserError
from k8scifar.ranks import agree
from k8scifar.ranks.world import World

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

PIECE = 1 << 18  # bytes
AHEAD = 16  # pieces in flight to all receivers: few enough to pass a slow wire within the shortest time-out
FLAGS_EVERY = 8  # pieces between two exchanges of flags; two such exchanges are in flight at a time
LOG_EVERY = 10.0  # seconds between two log lines about one file


@dataclass(frozen=True)
class File:
    """A file that is to be equal on all nodes."""

    name: str  # its path in the folder
    sha256: str
    bytes: int

    @classmethod
    def of(cls, folder: Path, name: str) -> File:
        """Describe an existing file. Raises OSError."""
        content = files.read(folder / name)
        return cls(name, hashlib.sha256(content).hexdigest(), len(content))

    def is_in(self, folder: Path) -> bool:
        """Whether this folder has the complete file. Raises OSError if it can't be read."""
        path = folder / self.name
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            if path.stat().st_size == self.bytes:
                return hashlib.sha256(files.read(path)).hexdigest() == self.sha256
        return False


def spread(offered: Sequence[File], folder: Path, wanted: Sequence[str], source: int, world: World) -> None:
    """Copy files from the folder of rank `source` to the folders of the ranks that want them, in order; collective.

    A file gets its name only after its sha256 is verified. A broken transfer resumes at the byte where it ended. All
    ranks take part in every piece, so that none waits long for another.

    Args:
        offered: the same on all ranks.
        wanted: names of the files that this rank lacks.

    Raises:
        TrainingError: this rank's file could not be read or written.
        PeerLost: on the other ranks then.
    """
    parts = {file.name: _Part(folder, file) for file in offered if file.name in wanted}
    try:
        offsets = agree.each(world, lambda: {name: part.open() for name, part in parts.items()})
        for file in offered:
            takers = {rank: found[file.name] for rank, found in enumerate(offsets) if file.name in found}
            if takers:
                _send(file, folder / file.name, takers, parts.get(file.name), source, world)
                agree.each(world, parts[file.name].finish if file.name in parts else None)
    finally:
        for part in parts.values():
            part.close()


def _send(file: File, path: Path, takers: dict[int, int], part: _Part | None, source: int, world: World) -> None:
    """Send the rest of one file to each of `takers` (rank -> bytes that it already has)."""
    flight = _Flight(part, world, max(1, AHEAD // len(takers)))
    while pending := {rank: offset for rank, offset in takers.items() if offset < file.bytes}:
        works: list[tuple[dist.Work, torch.Tensor]] = []
        for rank, offset in pending.items():
            length = min(PIECE, file.bytes - offset)
            if world.rank == source:
                piece, why = _read(path, offset, length)
                flight.problem = flight.problem or why
                works.append((dist.isend(piece, rank, group=world.host_group), piece))
            elif world.rank == rank:
                piece = torch.empty(length, dtype=torch.uint8)
                works.append((dist.irecv(piece, source, group=world.host_group), piece))
            takers[rank] += length
        flight.start(works)
        if flight.full:
            flight.land()
        if flight.failed:
            break
    while flight.pieces:
        flight.land()
    _agree(flight.problem, file, world)


class _Flight:
    """The pieces of a file in flight, up to `ahead` at a time, so that none waits for another's round trip.

    With every FLAGS_EVERYth piece the ranks exchange whether they have had a problem; if so, all stop after the same
    piece.
    """

    def __init__(self, part: _Part | None, world: World, ahead: int) -> None:
        self._part, self._world, self._ahead = part, world, ahead
        self.pieces: deque[tuple[list[tuple[dist.Work, torch.Tensor]], agree.Agreement | None]] = deque()
        self._started = 0
        self.problem = ""  # of this rank
        self.failed = False  # the same on all ranks

    @property
    def full(self) -> bool:
        return len(self.pieces) == self._ahead

    def start(self, works: list[tuple[dist.Work, torch.Tensor]]) -> None:
        """Add a piece; `works` are this rank's sends and receives of it."""
        agreement = None
        if self._started % FLAGS_EVERY == 0:
            agreement = agree.Agreement(self._world, ("problem",))
            agreement.begin(problem=bool(self.problem))
        self.pieces.append((works, agreement))
        self._started += 1

    def land(self) -> None:
        """Wait for the oldest piece, and write it if this rank receives the file."""
        works, agreement = self.pieces.popleft()
        self._world.heartbeats.arrive()
        for work, piece in works:
            work.wait()
            if self._part and not self.problem:
                self.problem = self._part.add(piece)
        if agreement and agreement.end():
            self.failed = True
        liveness.touch()


def _agree(problem: str, file: File, world: World) -> None:
    """If a rank has a problem, raise TrainingError there and PeerLost on the others; collective."""
    odd = agree.gather(torch.tensor([bool(problem)]), world)[:, 0].nonzero()
    if problem:
        raise TrainingError(problem)
    if len(odd):
        raise PeerLost(f"rank {odd[0].item()} could not read or write {file.name}, which one node sends to another")


def _read(path: Path, offset: int, length: int) -> tuple[torch.Tensor, str]:
    """Return a piece of a file and "", or zeros and the reason why it can't be read."""
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            content = files.patiently(lambda: file.read(length))
        if len(content) == length:
            return torch.frombuffer(bytearray(content), dtype=torch.uint8), ""
        why = "it has become shorter"
    except OSError as error:
        why = str(error.strerror)
    return torch.zeros(length, dtype=torch.uint8), f"{path} can't be read: {why}"


class _Part:
    """A file that is being received, in the same folder under another name."""

    def __init__(self, folder: Path, file: File) -> None:
        self._file, self._path = file, folder / file.name
        self._beside = self._path.with_name(f".{self._path.name}.part")
        self._open: BinaryIO | None = None
        self._logged = time.monotonic()

    def open(self) -> int:
        """Open the file; return the bytes already received. Raises UserError, or TrainingError if the disk is full."""
        try:
            files.make_folder(self._path.parent)
            self._open = open(self._beside, "a+b")  # noqa: SIM115 (held open on purpose)
            if fcntl is not None:
                fcntl.flock(self._open, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise TrainingError(f"another process is receiving {self._path}; this one waits for it") from None
        except OSError as error:
            kind = TrainingError if error.errno in files.FULL | files.TRANSIENT else UserError
            raise kind(files.unwritten(self._path, error)) from None
        size = self._open.seek(0, os.SEEK_END)
        if size > self._file.bytes:
            size = self._open.truncate(0)
        if size:
            say(f"{self._path.name}: {_mb(size)} of {_mb(self._file.bytes)} are already here; resuming")
        return size

    def add(self, piece: torch.Tensor) -> str:
        """Append a piece; return the reason why it could not be written, or ""."""
        assert self._open
        try:
            self._open.write(piece.numpy())
            self._open.flush()
        except OSError as error:
            return files.unwritten(self._path, error)
        if time.monotonic() - self._logged > LOG_EVERY:
            self._logged = time.monotonic()
            say(f"{self._path.name}: {_mb(self._open.tell())} of {_mb(self._file.bytes)} received")
        return ""

    def finish(self) -> None:
        """Verify the complete file and give it its name. Raises TrainingError."""
        assert self._open
        try:
            os.fsync(self._open.fileno())
            self._open.seek(0)
            digest = hashlib.sha256(files.patiently(self._open.read)).hexdigest()
            if digest != self._file.sha256:
                self._beside.unlink(missing_ok=True)
                raise TrainingError(f"{self._path} has another sha256 than was announced; it will be sent again")
            os.replace(self._beside, self._path)
            files.sync_folder(self._path.parent)
        except OSError as error:
            raise TrainingError(files.unwritten(self._path, error)) from None

    def close(self) -> None:
        """Close the file; what was received stays for the next attempt."""
        if self._open:
            with contextlib.suppress(OSError):
                self._open.close()


def _mb(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"
