"""Files from one rank to others, over the ranks' own connections: in pieces, checked, and resumed where it broke."""

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
AHEAD = 16  # pieces under way to all who take them: little enough to pass a slow wire within the shortest time-out
WORD = 8  # pieces from one word of all ranks to the next; gloo has two such words under way at a time
TELL = 10.0  # seconds between two lines about one file


@dataclass(frozen=True)
class File:
    """A file of a folder that is the same on all nodes."""

    name: str  # its path in the folder
    sha256: str  # whole
    bytes: int

    @classmethod
    def of(cls, folder: Path, name: str) -> File:
        """The file that is there. Raises OSError."""
        content = files.read(folder / name)
        return cls(name, hashlib.sha256(content).hexdigest(), len(content))

    def is_in(self, folder: Path) -> bool:
        """Whether it is in this folder, whole. Raises OSError where that can't be told."""
        path = folder / self.name
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            if path.stat().st_size == self.bytes:
                return hashlib.sha256(files.read(path)).hexdigest() == self.sha256
        return False


def spread(offered: Sequence[File], folder: Path, wanted: Sequence[str], source: int, world: World) -> None:
    """Bring files from the folder of rank `source` into the folders of those that want them, in this order; collective.

    A file has its name only once it is whole and its sha256 is right; what a broken transfer left goes on where it
    ended. All ranks follow every piece, so that none waits long for another.

    Args:
        offered: the same on all ranks.
        wanted: names of those that this rank lacks.

    Raises:
        TrainingError: this rank's file could not be read or written; PeerLost on the others.
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
    """Send the rest of one file to each of `takers` (rank -> bytes that it has)."""
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
    """The pieces of a file that are under way, `ahead` at a time, so that none waits for another's round trip.

    With every WORDth piece the ranks tell whether they have had a problem by then; once one has, all stop after the
    same piece.
    """

    def __init__(self, part: _Part | None, world: World, ahead: int) -> None:
        self._part, self._world, self._ahead = part, world, ahead
        self.pieces: deque[tuple[list[tuple[dist.Work, torch.Tensor]], agree.Agreement | None]] = deque()
        self._started = 0
        self.problem = ""  # this rank's own
        self.failed = False  # the same on all ranks

    @property
    def full(self) -> bool:
        return len(self.pieces) == self._ahead

    def start(self, works: list[tuple[dist.Work, torch.Tensor]]) -> None:
        """Add a piece, of which `works` is this rank's part."""
        word = None
        if self._started % WORD == 0:
            word = agree.Agreement(self._world, ("problem",))
            word.begin(problem=bool(self.problem))
        self.pieces.append((works, word))
        self._started += 1

    def land(self) -> None:
        """Wait for the oldest piece, and keep it where it was asked for."""
        works, word = self.pieces.popleft()
        self._world.pulse.arrive()
        for work, piece in works:
            work.wait()
            if self._part and not self.problem:
                self.problem = self._part.add(piece)
        if word and word.end():
            self.failed = True
        liveness.touch()


def _agree(problem: str, file: File, world: World) -> None:
    """Raise on all ranks where one has a problem. Raises TrainingError there, PeerLost elsewhere."""
    odd = agree.gather(torch.tensor([bool(problem)]), world)[:, 0].nonzero()
    if problem:
        raise TrainingError(problem)
    if len(odd):
        raise PeerLost(f"rank {odd[0].item()} could not read or write {file.name}, which one node gives another")


def _read(path: Path, offset: int, length: int) -> tuple[torch.Tensor, str]:
    """A piece of a file, and "", or as many zeros, and why it can't be read."""
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            content = files.patiently(lambda: file.read(length))
        if len(content) == length:
            return torch.frombuffer(bytearray(content), dtype=torch.uint8), ""
        why = "it is shorter than it was"
    except OSError as error:
        why = str(error.strerror)
    return torch.zeros(length, dtype=torch.uint8), f"{path} can't be read: {why}"


class _Part:
    """A file that is being received: its beginning lies beside its place, under another name."""

    def __init__(self, folder: Path, file: File) -> None:
        self._file, self._path = file, folder / file.name
        self._beside = self._path.with_name(f".{self._path.name}.part")
        self._open: BinaryIO | None = None
        self._told = time.monotonic()

    def open(self) -> int:
        """How many bytes of it are here already. Raises UserError, or TrainingError where the disk is full."""
        try:
            files.make_folder(self._path.parent)
            self._open = open(self._beside, "a+b")  # noqa: SIM115 (held open on purpose)
            if fcntl is not None:
                fcntl.flock(self._open, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise TrainingError(f"another process receives {self._path} too; this one waits for it") from None
        except OSError as error:
            kind = TrainingError if error.errno in files.FULL | files.TRANSIENT else UserError
            raise kind(files.unwritten(self._path, error)) from None
        size = self._open.seek(0, os.SEEK_END)
        if size > self._file.bytes:
            size = self._open.truncate(0)
        if size:
            say(f"{self._path.name}: {_mb(size)} of {_mb(self._file.bytes)} are here already; going on")
        return size

    def add(self, piece: torch.Tensor) -> str:
        """Append what came; returns why it could not be written, "" if it was."""
        assert self._open
        try:
            self._open.write(piece.numpy())
            self._open.flush()
        except OSError as error:
            return files.unwritten(self._path, error)
        if time.monotonic() - self._told > TELL:
            self._told = time.monotonic()
            say(f"{self._path.name}: {_mb(self._open.tell())} of {_mb(self._file.bytes)} have come")
        return ""

    def finish(self) -> None:
        """Check the whole file and give it its name. Raises TrainingError."""
        assert self._open
        try:
            os.fsync(self._open.fileno())
            self._open.seek(0)
            digest = hashlib.sha256(files.patiently(self._open.read)).hexdigest()
            if digest != self._file.sha256:
                self._beside.unlink(missing_ok=True)
                raise TrainingError(f"{self._path} did not come as it was announced (its sha256); it is sent once more")
            os.replace(self._beside, self._path)
            files.sync_folder(self._path.parent)
        except OSError as error:
            raise TrainingError(files.unwritten(self._path, error)) from None

    def close(self) -> None:
        """Leave what came for the next attempt."""
        if self._open:
            with contextlib.suppress(OSError):
                self._open.close()


def _mb(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"
