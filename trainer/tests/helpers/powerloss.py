"""Every state that a power cut may leave of a folder, from a record of what was written there.

What POSIX promises: the content of a file is safe once the file is fsynced, a new, renamed or removed name once its
folder is. Until then each change may be kept or lost, whatever became of the others, and a write may be torn.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

Tree = tuple[tuple[str, bytes | None], ...]  # path -> content, None: a folder; parents first
HOOKED = ("fsync", "replace", "rename", "unlink")


class Record:
    """Within it, changes below `folder` are noted before and after each of HOOKED, by any thread of this process.

    A file is known by its inode, so that a new name for it is told from new content.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._real = folder, {name: getattr(os, name) for name in HOOKED}
        self._inodes: dict[int, int] = {}  # st_ino -> a number that no later file takes over
        self._names: dict[str, int] = {}  # path -> inode
        self._contents: dict[int, bytes | None] = {}
        self._count = 0
        self._changes: list[tuple[str, Any, Any]] = []  # ("name", path, inode) ("data", inode, content) ("sync", inode)
        self._look()
        self._first = dict(self._names), dict(self._contents)
        self._changes.clear()

    def __enter__(self) -> Record:
        for name in HOOKED:
            setattr(os, name, self._hook(name))
        return self

    def __exit__(self, *_: object) -> None:
        for name, real in self._real.items():
            setattr(os, name, real)
        self._look()

    def _hook(self, name: str) -> Callable[..., Any]:
        def hooked(*arguments: Any, **options: Any) -> Any:
            self._look()
            result = self._real[name](*arguments, **options)
            self._look()
            if name == "fsync" and (inode := self._inodes.get(os.fstat(arguments[0]).st_ino)) is not None:
                self._changes.append(("sync", inode, None))
            return result

        return hooked

    def _look(self) -> None:
        """Note what differs from the last look."""
        found, inodes = {}, {}
        for path in [self._folder, *sorted(self._folder.rglob("*"))]:
            number = path.stat().st_ino
            if number not in self._inodes:
                self._count += 1
            inodes[number] = inode = inodes.get(number) or self._inodes.get(number, self._count)
            name = os.path.relpath(path, self._folder)
            content = None if path.is_dir() else path.read_bytes()
            if self._names.get(name) != inode:
                self._changes.append(("name", name, inode))
            if self._contents.get(inode, b"") != content:
                self._changes.append(("data", inode, content))
            found[name], self._contents[inode] = inode, content
        self._changes += [("name", name, None) for name in self._names if name not in found]
        self._names, self._inodes = found, inodes

    def states(self) -> Iterator[tuple[Tree, bool]]:
        """Each tree that a power cut may leave, once, and whether the writer had returned by then."""
        seen = set()
        for end in range(len(self._changes) + 1):
            for tree in self._after(self._changes[:end]):
                state = tree, end == len(self._changes)
                if state not in seen:
                    seen.add(state)
                    yield state

    def _after(self, changes: list[tuple[str, Any, Any]]) -> Iterator[Tree]:
        """The trees that may be left when power is lost right after these changes."""
        names = {name: [inode] for name, inode in self._first[0].items()}  # what each may be: the safe one first
        contents = {inode: [content] for inode, content in self._first[1].items()}
        for kind, key, value in changes:
            if kind == "name":
                names.setdefault(key, [None]).append(value)
            elif kind == "data":
                contents.setdefault(key, [] if value is None else [b""]).append(value)
            else:  # of a folder its names, of a file its content
                contents[key] = contents[key][-1:]
                inside = [name for name in names if key in names.get(os.path.dirname(name) or ".", ()) and name != "."]
                names |= {name: names[name][-1:] for name in inside}
        torn = {
            inode: [each[-1][: len(each[-1]) // 2]] for inode, each in contents.items() if len(each) > 1 and each[-1]
        }
        for chosen in product(*names.values()):
            tree = {name: inode for name, inode in zip(names, chosen, strict=True) if inode is not None}
            whole = {name: i for name, i in tree.items() if _reached(name, tree)}
            used = sorted(set(whole.values()))
            for some in product(*(contents.get(inode, [b""]) + torn.get(inode, []) for inode in used)):
                content = dict(zip(used, some, strict=True))
                yield tuple((name, content[inode]) for name, inode in sorted(whole.items()))


def _reached(name: str, tree: dict[str, int]) -> bool:
    """Whether all folders above a name are there."""
    above = os.path.dirname(name)
    return not above or (above in tree and _reached(above, tree))


def lay(tree: Tree, folder: Path) -> Path:
    """Make such a tree in a new folder."""
    for name, content in tree:
        if content is None:
            (folder / name).mkdir(parents=True)
        else:
            (folder / name).write_bytes(content)
    return folder
