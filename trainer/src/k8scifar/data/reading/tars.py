"""Tars as trees: plain, or compressed by gzip, bzip2, xz or zstandard."""

from __future__ import annotations

import bz2
import io
import lzma
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from k8scifar.data.reading.archive_members import PIECE, UNPACK, Archive, NotWhole, parts
from k8scifar.data.reading.tree import File, Lost, check_size
from k8scifar.errors import UserError

KNOWN = "give a folder, or a .tar, .tar.gz, .tar.bz2, .tar.xz or .zip of one"
HEADER_BYTES = 1 << 20  # of a tar's header with its long names: real ones have a few kB


class _Gzip:
    """zlib's decompressor with the interface of bz2's and lzma's."""

    def __init__(self) -> None:
        self._inner = zlib.decompressobj(31)  # with gzip's header, its check sum and length

    def decompress(self, data: bytes, size: int) -> bytes:
        return self._inner.decompress(self._inner.unconsumed_tail + data, size)

    def __getattr__(self, name: str) -> Any:
        return not self._inner.unconsumed_tail if name == "needs_input" else getattr(self._inner, name)


def _xz() -> Any:
    return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=1 << 30)


def compression(start: bytes, label: str) -> Callable[[], Any] | None:
    """What unpacks a file that begins so; None where none of ours does. Raises UserError where it can't here."""
    if start.startswith(b"\xfd7zXZ\0") and start[7:8] == b"\0":
        raise UserError(f"{label} is packed by xz without a check sum; pack it with one, or {UNPACK}")
    for magic, make in ((b"\x1f\x8b", _Gzip), (b"BZh", bz2.BZ2Decompressor), (b"\xfd7zXZ\0", _xz)):
        if start.startswith(magic):
            return make
    return _zstandard(start, label) if start.startswith(b"\x28\xb5\x2f\xfd") else None


def _zstandard(start: bytes, label: str) -> Callable[[], Any]:
    if not start[4] & 4:
        raise UserError(f"{label} is packed by zstandard without a check sum; pack it as .tar.gz, or {UNPACK}")
    try:
        from compression.zstd import ZstdDecompressor
    except ImportError:
        raise UserError(f"{label} is packed by zstandard, which needs Python 3.14; run `zstd -d` on it first") from None
    return ZstdDecompressor


class _Unpacked(io.RawIOBase):
    """The bytes of a compressed file to its very end: every check sum compared, nothing but zeros after it."""

    def __init__(self, file: BinaryIO, make: Callable[[], Any]) -> None:
        self._file, self._make, self._inner, self._input = file, make, make(), b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            if self._inner.eof:
                rest = self._inner.unused_data.lstrip(b"\0")
                while not rest:
                    rest = self._file.read(PIECE)
                    if not rest:
                        return 0
                    rest = rest.lstrip(b"\0")
                self._inner, self._input = self._make(), rest  # another part, as parallel compressors write them
            data = self._input
            if not data and self._inner.needs_input:
                data = self._file.read(PIECE)
            self._input = b""
            piece = self._inner.decompress(data, len(buffer))
            if piece:
                buffer[: len(piece)] = piece
                return len(piece)
            if not data and not self._inner.eof and self._inner.needs_input:
                raise NotWhole("it ends before its end mark")


class _Forward:
    """A file read from start to end: what tarfile's listing needs, and nothing that a bad header can turn into more."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._at, self._ended = file, 0, False
        self.block = b""  # what was read last

    def tell(self) -> int:
        return self._at

    def seek(self, position: int) -> None:
        if position < self._at:
            raise NotWhole("a member ends before it begins")
        if self._file.seekable():
            self._file.seek(position)
            self._at = position
        while self._at < position:
            piece = self._file.read(min(PIECE, position - self._at))
            if not piece:
                raise NotWhole("it ends within a member")
            self._at += len(piece)

    def read(self, size: int) -> bytes:
        if size > HEADER_BYTES or size < 0:
            raise NotWhole(f"a header of {size:,} bytes")
        piece = self._file.read(size)
        if not piece and self._ended:
            raise NotWhole("it ends within a header")
        self._ended = not piece
        self._at += len(piece)
        self.block = piece
        return piece


class _NoTar(Exception):
    """The first bytes are no header of a tar."""


class _Member(tarfile.TarInfo):
    """A member whose header is right: tarfile ends its listing without a word at one that is not."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> tarfile.TarInfo:
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:
            raise
        except tarfile.HeaderError as error:
            at, block = archive.fileobj.tell(), archive.fileobj.block
            if at <= tarfile.BLOCKSIZE and block[257:262] != b"ustar":
                raise _NoTar from None
            if not block:
                raise NotWhole("its end mark is missing") from None
            raise NotWhole(f"a damaged header before byte {at:,}: {error}") from None


class Tar(Archive):
    """A tar, whole."""

    def __init__(self, path: Path, label: str, make: Callable[[], Any] | None) -> None:
        super().__init__(label)
        self._path, self._compressor = path, make
        with self.reading(), self._stream() as stream:
            try:
                self._list(stream)
            except _NoTar:
                what = "holds no .tar" if make else "is no archive that is known"
                raise UserError(f"{label} {what}; {KNOWN}") from None

    def close(self) -> None:
        self._tree.clear()

    @contextmanager
    def _stream(self) -> Iterator[BinaryIO]:
        with open(self._path, "rb") as file:
            yield io.BufferedReader(_Unpacked(file, self._compressor), PIECE) if self._compressor else file

    def _list(self, stream: BinaryIO) -> None:
        with tarfile.open(fileobj=_Forward(stream), mode="r:", tarinfo=_Member) as archive:
            while (member := archive.next()) is not None:
                self._add(member)
                archive.members.clear()  # kept here, as little more than a name and a place
        while piece := stream.read(PIECE):
            if piece.strip(b"\0"):
                raise NotWhole("more comes after its end mark")

    def _add(self, member: tarfile.TarInfo) -> None:
        name = member.name
        if member.isdir():
            self.place(name, {})
        elif member.issym():
            self.place(name, member.linkname)
        elif member.islnk():
            target = self.follow(parts(member.linkname))[0]
            lost = Lost(f"is a hard link to {member.linkname}, which is not in the archive")
            self.place(name, target if isinstance(target, File) else lost)
        elif member.isreg():
            if member.size < 0:
                raise NotWhole(f"{name} has {member.size} bytes")
            pieces = member.sparse if member.issparse() else None
            self.place(name, File(member.size, (member.offset_data, pieces)), member.size)
        else:
            self.place(name, Lost("is neither a file nor a folder, but a pipe or device"))

    def contents(self, files: dict[str, File]) -> Iterator[tuple[str, bytes]]:
        with self._stream() as stream:
            at, last, content = 0, None, b""
            for key, file in sorted(files.items(), key=lambda item: item[1].where[0]):
                check_size(file, f"{self.label}: {key}")
                offset, pieces = file.where
                with self.reading():
                    if offset != last:  # hard links share it
                        while at < offset:
                            at += len(_exactly(stream, min(PIECE, offset - at)))
                        stored = file.size if pieces is None else sum(size for _, size in pieces)
                        content, last = _exactly(stream, stored), offset
                        at += stored
                        content = content if pieces is None else _filled(content, pieces, file.size)
                yield key, content


def _exactly(stream: BinaryIO, size: int) -> bytes:
    content = stream.read(size)
    if len(content) != size:
        raise NotWhole("it ends within a member")
    return content


def _filled(stored: bytes, pieces: list[tuple[int, int]], size: int) -> bytes:
    """A sparse file's content, its holes filled with zeros."""
    content, at = bytearray(size), 0
    for offset, length in pieces:
        if not 0 <= offset <= offset + length <= size:
            raise NotWhole("a sparse member reaches beyond its end")
        content[offset : offset + length] = stored[at : at + length]
        at += length
    return bytes(content)
