"""Zips as trees."""

from __future__ import annotations

import contextlib
import os
import stat
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from k8scifar.data.reading.archive_members import PIECE, UNPACK, Archive, NotWhole
from k8scifar.data.reading.tree import File, Lost, check_size
from k8scifar.errors import UserError


class Zip(Archive):
    """A zip, whole: each member's header and check sum compared with the directory at the end."""

    def __init__(self, path: Path, label: str) -> None:
        super().__init__(label)
        with self.reading():
            self._zip = zipfile.ZipFile(path)
            try:
                self._list(path)
            except BaseException:
                self._zip.close()
                raise

    def close(self) -> None:
        self._tree.clear()
        self._zip.close()

    def _list(self, path: Path) -> None:
        members = self._zip.infolist()
        announced = _announced(path)
        if announced != len(members):
            raise NotWhole(f"{len(members):,} of {announced:,} members are listed")
        names = [_zip_name(member) for member in members]
        if names and all(name.endswith(".npy") for name in names):
            raise UserError(
                f"{self.label} is an .npz of NumPy arrays; write its images to train/<class>/ and test/<class>/"
            )
        for member, name in zip(members, names, strict=True):
            if member.flag_bits & 1:
                raise UserError(f"{self.label}: {name} is encrypted; unpack it with its password and name the folder")
            kind = stat.S_IFMT(member.external_attr >> 16)
            node: Any = File(member.file_size, member)
            if name.endswith("/"):
                node = {}
            elif kind == stat.S_IFLNK:
                node = self._read(member, 4096).decode("utf-8", "surrogateescape")
            elif kind in (stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR, stat.S_IFBLK):
                node = Lost("is neither a file nor a folder, but a pipe or device")
            self.place(name, node, member.file_size)
            self._check(member, name)

    def _check(self, member: zipfile.ZipInfo, name: str) -> None:
        """Read a member through, for its check sum."""
        try:
            with self._zip.open(member) as file:
                while file.read(PIECE):
                    pass
        except NotImplementedError as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{self.label}: {name} can't be unpacked here ({reason}); {UNPACK}") from None

    def _read(self, member: zipfile.ZipInfo, limit: int) -> bytes:
        if member.file_size > limit:
            raise NotWhole(f"a link of {member.file_size:,} bytes")
        return self._zip.read(member)

    def contents(self, files: dict[str, File]) -> Iterator[tuple[str, bytes]]:
        for key, file in sorted(files.items(), key=lambda item: item[1].where.header_offset):
            check_size(file, f"{self.label}: {key}")
            with self.reading():
                content = self._zip.read(file.where)
            yield key, content


def _zip_name(member: zipfile.ZipInfo) -> str:
    """A member's name: slashes for the backslashes of some Windows programs, UTF-8 where it is that unannounced."""
    name = member.filename
    if not member.flag_bits & 0x800:
        with contextlib.suppress(UnicodeError):
            name = name.encode("cp437").decode("utf-8")
    return name.replace("\\", "/")


def _announced(path: Path) -> int:
    """How many members the end of a zip says that there are: zipfile does not compare it with what it lists."""
    with open(path, "rb") as file:
        length = file.seek(0, os.SEEK_END)
        file.seek(max(0, length - (1 << 16) - 22))
        tail = file.read()
        at = tail.rindex(b"PK\5\6")
        (count,) = struct.unpack_from("<H", tail, at + 10)
        if at >= 20 and tail[at - 20 : at - 16] == b"PK\6\7":  # zip64 has another end before this one
            file.seek(struct.unpack_from("<Q", tail, at - 12)[0])
            end = file.read(56)
            if end[:4] == b"PK\6\6":
                (count,) = struct.unpack_from("<Q", end, 32)
    return count
