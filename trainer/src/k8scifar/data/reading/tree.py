"""Folders, and archives of folders, as one kind of tree that is walked in one way.

Links are followed, as torchvision does; one that leads back to a folder above it is left out.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from k8scifar.data.reading.decode import SUFFIXES
from k8scifar.errors import TrainingError, UserError
from k8scifar.files import TRANSIENT, patiently
from k8scifar.files import read as read_file
from k8scifar.urls import local

DEPTH = 64
FILES = 2_000_000  # about 1 GB of names and places
# A file that is read is held in memory: these are far above an image's, and far below what would hurt.
MEMBER_BYTES = 512 << 20
# What systems and programs leave beside people's files; anything that begins with a dot is hidden too.
HIDDEN = {"__macosx", "thumbs.db", "desktop.ini", "lost+found", "@eadir", "$recycle.bin", "system volume information"}


@dataclass(frozen=True, slots=True)
class File:
    """A file of `size` bytes, to be read at `where`, which means something to its source alone."""

    size: int
    where: Any


@dataclass(frozen=True)
class Lost:
    """What is there by name and can't be used, and why."""

    reason: str


@dataclass(frozen=True)
class Folder:
    """A folder; `identity` is the same wherever a link leads to it."""

    identity: Any
    where: Any


Node = File | Folder | Lost


class Source(Protocol):
    """Where images come from: a folder or an archive."""

    label: str
    root: Folder

    def children(self, folder: Folder) -> Iterator[tuple[str, Node]]:
        """What lies in a folder, links resolved. Raises OSError."""
        ...

    def contents(self, files: dict[str, File]) -> Iterator[tuple[str, bytes]]:
        """The bytes of the files, each under its key, in the order that suits the source. Raises UserError."""
        ...


@dataclass(eq=False)
class Place:
    """A folder as it was walked."""

    path: str  # from the root, as people write it; "" is the root
    identity: Any
    folders: dict[str, Place] = field(default_factory=dict)
    files: dict[str, File] = field(default_factory=dict)
    lost: dict[str, str] = field(default_factory=dict)  # name -> why it can't be used
    hidden: int = 0
    loops: int = 0

    def name(self, child: str = "") -> str:
        """The path of a child, or of the place itself, for people."""
        return "/".join(part for part in (self.path, child) if part) or "."

    @cached_property
    def below(self) -> list[Place]:
        """The place and all below it, in order."""
        return [self, *(place for name in sorted(self.folders) for place in self.folders[name].below)]

    @cached_property
    def images(self) -> dict[str, File]:
        """The images in the place and below it, by their paths from it."""
        own = {name: file for name, file in self.files.items() if is_image(name)}
        for name, place in self.folders.items():
            own |= {f"{name}/{path}": file for path, file in place.images.items()}
        return own

    @cached_property
    def file_count(self) -> int:
        """The files in the place and below it, hidden ones left out."""
        return sum(len(place.files) for place in self.below)


def suffix(name: str) -> str:
    """The suffix of a file's name in small letters, "" where it has none."""
    return os.path.splitext(name)[1].lower()


def is_image(name: str) -> bool:
    """Whether a file of this name is taken for an image."""
    return suffix(name) in SUFFIXES


def is_hidden(name: str) -> bool:
    """Whether this name is a system's, not a person's."""
    return name.startswith(".") or name.lower() in HIDDEN


def walk(source: Source) -> Place:
    """All that lies in `source`. Raises UserError where there is too much of it, or its root can't be read."""
    total = 0

    def visit(folder: Folder, path: str, above: tuple[Any, ...]) -> Place:
        nonlocal total
        place = Place(path, folder.identity)
        for name, node in source.children(folder):
            total += 1
            if total > FILES or len(above) > DEPTH:
                what = f"more than {FILES:,} files" if total > FILES else f"folders nested more than {DEPTH} deep"
                raise UserError(f"{source.label} holds {what} (at {place.name(name)}); name the folder of the images")
            if is_hidden(name):
                place.hidden += 1
            elif isinstance(node, File):
                place.files[name] = node
            elif isinstance(node, Lost):
                place.lost[name] = node.reason
            elif node.identity in above:
                place.loops += 1
            else:
                try:
                    place.folders[name] = visit(node, place.name(name) if path else name, (*above, node.identity))
                except OSError as error:
                    if error.errno in TRANSIENT:
                        raise unread(error, f"{source.label}: {place.name(name)}") from None
                    place.lost[name] = f"can't be read ({error.strerror})"
        return place

    try:
        return visit(source.root, "", (source.root.identity,))
    except OSError as error:
        raise unread(error, source.label) from None


def unread(error: OSError, what: str) -> Exception:
    """The failure of reading `what`, as a mistake of the user's or one of the volume's that a restart may mend."""
    reason = error.strerror or str(error)
    if error.errno in TRANSIENT:
        return TrainingError(f"{what} can't be read ({reason}); look at its volume")
    return UserError(f"{what} can't be read ({reason}); check its permissions")


class Disk:
    """A folder on disk."""

    def __init__(self, path: Path, label: str) -> None:
        self.label = label
        about = patiently(lambda: os.stat(path))
        self.root = Folder((about.st_dev, about.st_ino), str(path))

    def children(self, folder: Folder) -> Iterator[tuple[str, Node]]:
        for name in sorted(patiently(lambda: os.listdir(folder.where))):
            path = os.path.join(folder.where, name)
            yield name, Lost("is hidden") if is_hidden(name) else self._node(path)

    def _node(self, path: str) -> Node:
        try:
            about = patiently(lambda: os.stat(path))
        except OSError as error:
            if error.errno in TRANSIENT:
                raise
            if os.path.islink(path):
                return Lost(f"is a link to {os.readlink(path)}, which can't be followed ({error.strerror})")
            return Lost(f"can't be read ({error.strerror})")
        if stat.S_ISDIR(about.st_mode):
            return Folder((about.st_dev, about.st_ino), path)
        if stat.S_ISREG(about.st_mode):
            return File(about.st_size, path)
        return Lost("is neither a file nor a folder, but a pipe, socket or device")

    def contents(self, files: dict[str, File]) -> Iterator[tuple[str, bytes]]:
        for key, file in files.items():
            check_size(file, f"{self.label}: {key}")
            try:
                yield key, read_file(Path(file.where))
            except OSError as error:
                raise unread(error, f"{self.label}: {key}") from None

    def close(self) -> None:
        pass


def check_size(file: File, what: str) -> None:
    """Raise UserError where a file is too large to be an image, before it is read."""
    if file.size > MEMBER_BYTES:
        raise UserError(
            f"{what} has {file.size / 1e6:,.0f} MB, over the limit of {MEMBER_BYTES / 1e6:.0f}; "
            "remove it or make it smaller"
        )


def read_image(name: str) -> bytes:
    """The content of one image file. Raises UserError where there is none or it is too large, TrainingError where its
    volume fails.
    """
    path = local(name)
    try:
        about = patiently(lambda: os.stat(path))
        if not stat.S_ISREG(about.st_mode):
            raise UserError(f"image {name} is no file, but a folder, pipe or device; name a file")
        check_size(File(about.st_size, path), f"image {name}")
        return read_file(path)
    except FileNotFoundError:
        raise UserError(f"image {name}: there is no such file; check the path") from None
    except OSError as error:
        raise unread(error, f"image {name}") from None
