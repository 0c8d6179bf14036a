"""Where images come from, opened: a folder, or an archive, recognised by its content.

An archive is read twice, and never unpacked to disk: first to its end, so that all of its check sums are compared and
all of its names and sizes are known, then for the images. Whatever breaks off or is skipped in the first reading makes
it "not a whole archive", before anything is judged by what it holds.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from k8scifar.data.reading.archive_members import UNPACK, WRITE
from k8scifar.data.reading.tars import Tar, compression
from k8scifar.data.reading.tree import Disk, Source, unread
from k8scifar.data.reading.zips import Zip
from k8scifar.errors import UserError

# What people have instead of an archive that is taken: how it begins, what it is, and the way.
OTHERS = (
    (b"7z\xbc\xaf\x27\x1c", "is a .7z archive", UNPACK),
    (b"Rar!\x1a\x07", "is a .rar archive", UNPACK),
    (b"\x1f\x9d", "is a .Z archive", UNPACK),
    (b"\x5d\x00\x00", "is a .lzma archive, which has no check sum", "pack it as .tar.xz, or " + UNPACK),
    (b"PAR1", "is a Parquet file", WRITE),
    (b"\x93NUMPY", "is a NumPy array", WRITE),
    (b"\x89HDF", "is an HDF5 file", WRITE),
    (b"version https://git-lfs", "is a pointer of Git LFS, not the archive", "fetch it with `git lfs pull`"),
    (b"\xff\xd8\xff", "is a single image", "name the folder that holds train/ and test/"),
    (b"\x89PNG", "is a single image", "name the folder that holds train/ and test/"),
)


@contextmanager
def opened(path: Path, label: str) -> Iterator[Source]:
    """The folder or archive at `path` as a tree; `label` is what messages call it.

    Raises UserError where there is none, where it is of a kind that is not taken or not whole, TrainingError where its
    volume fails.
    """
    try:
        source = _open(path, label)
    except FileNotFoundError:
        raise UserError(f"{label}: there is no such file or folder; check the path") from None
    except OSError as error:
        raise unread(error, label) from None
    try:
        yield source
    finally:
        source.close()


def _open(path: Path, label: str) -> Source:
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        return Disk(path, label)
    if not stat.S_ISREG(mode):
        raise UserError(f"{label} is neither a file nor a folder; name a folder or an archive")
    with open(path, "rb") as file:
        start = file.read(512)
    if start[:4] in (b"PK\3\4", b"PK\5\6"):
        return Zip(path, label)
    for magic, what, way in OTHERS:
        if start.startswith(magic):
            raise UserError(f"{label} {what}; {way}")
    if start.lstrip()[:9].lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise UserError(f"{label} is a web page, not an archive; download the archive itself")
    if not start:
        raise UserError(f"{label} is empty; fetch or pack it again")
    return Tar(path, label, compression(start, label))
