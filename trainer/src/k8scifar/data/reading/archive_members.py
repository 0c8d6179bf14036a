"""What the archives share: their members as a tree, links followed, sizes looked at before anything is read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from k8scifar.data.reading.tree import FILES, File, Folder, Lost, Node, check_size, is_image, unread
from k8scifar.errors import TrainingError, UserError
from k8scifar.files import TRANSIENT

SUM_BYTES = 256 << 30  # of an archive's members, as announced: unpacking a bomb would take hours
PIECE = 1 << 20
LINKS = 40  # links that lead to links, as Linux has it
UNPACK = "unpack it and name the folder"
WRITE = "write its images to train/<class>/ and test/<class>/ and name the folder that holds both"


class NotWhole(Exception):
    """An archive that is damaged or cut short."""


class Archive:
    """What tars and zips share: a tree in memory, {name: its dict, a File, a Lost, or a link's target as str}."""

    def __init__(self, label: str) -> None:
        self.label = label
        self._tree: dict[str, Any] = {}
        self._count, self._sum = 0, 0
        self.root = Folder(id(self._tree), (self._tree, ()))

    def place(self, name: str, node: Any, size: int = 0) -> None:
        """Put a member into the tree; of two of one name the later is taken, as unpacking would have it."""
        self._count, self._sum = self._count + 1, self._sum + size
        if self._count > FILES or self._sum > SUM_BYTES:
            what = f"{FILES:,} members" if self._count > FILES else f"{SUM_BYTES / 1e9:.0f} GB when unpacked"
            raise UserError(f"{self.label} holds more than {what}; unpack it and name the folder of the images")
        if isinstance(node, File) and is_image(name):
            check_size(node, f"{self.label}: {name}")
        path = parts(name)
        folder = self._tree
        for part in path[:-1]:
            child = folder.setdefault(part, {})
            if not isinstance(child, dict):
                raise UserError(f"{self.label}: {name} lies in what is no folder; pack it anew")
            folder = child
        if not path or (node == {} and isinstance(folder.get(path[-1]), dict)):
            return
        folder[path[-1]] = node

    def children(self, folder: Folder) -> Iterator[tuple[str, Node]]:
        tree, path = folder.where
        for name in sorted(tree):
            node, at = self.follow((*path, name))
            yield name, Folder(id(node), (node, at)) if isinstance(node, dict) else node

    def follow(self, path: tuple[str, ...], links: list[int] | None = None) -> tuple[Any, tuple[str, ...]]:
        """(node, its own path) of a path in the tree, any links on the way followed; `links`: how many may be yet."""
        links = [LINKS] if links is None else links
        node, at = self._tree, ()
        for part in path:
            if part == "..":
                at = at[:-1]
                node = self.follow(at, links)[0]
                continue
            node = node.get(part) if isinstance(node, dict) else None
            at = (*at, part)
            if isinstance(node, str):
                links[0] -= 1
                if links[0] < 0:
                    return Lost("is a link that leads to itself, or to too many others"), at
                target = parts(node, keep=True) if node.startswith("/") else (*at[:-1], *parts(node, keep=True))
                found, where = self.follow(target, links)
                if found is None or isinstance(found, Lost):
                    return Lost(f"is a link to {node}, which is not in the archive"), at
                node, at = found, where
        return node, at

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Whatever goes wrong on the way says that the archive is not whole."""
        try:
            yield
        except (UserError, TrainingError):
            raise
        except Exception as error:  # tarfile and zipfile let through what their parts raise: zlib.error, struct.error
            if isinstance(error, OSError) and error.errno in TRANSIENT:
                raise unread(error, self.label) from None
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"{self.label} is not a whole archive ({reason}); fetch or pack it again") from None


def parts(name: str, keep: bool = False) -> tuple[str, ...]:
    """A member's name as parts below the archive's root, as tar unpacks it: nothing absolute, nothing above.

    `keep`: keep "..", for a link's target.
    """
    path = tuple(part for part in name.split("/") if part not in ("", "."))
    if keep or ".." not in path:
        return path
    return path[len(path) - path[::-1].index("..") :]
