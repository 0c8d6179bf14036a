"""Archives: whole or refused, whatever byte is damaged; what is none is named; and hostile ones."""

from __future__ import annotations

import bz2
import gzip
import lzma
import random
import struct
import sys
import tarfile
import zipfile
import zlib

import pytest
from data_sets import encoded, files, laid, pixels, refused, taken, tarred, zipped

from k8scifar.data.reading import archive_members, images, tree
from k8scifar.errors import UserError

SMALL = files(train=2, test=1)
ONE = encoded(pixels(71))
PACKERS = {
    "data.tar": tarred,
    "data.tar.gz": lambda content: gzip.compress(tarred(content), 9, mtime=0),
    "data.tar.bz2": lambda content: bz2.compress(tarred(content)),
    "data.tar.xz": lambda content: lzma.compress(tarred(content)),
    "data.zip": zipped,
    "stored.zip": lambda content: zipped(content, zipfile.ZIP_STORED),
    "bzip2.zip": lambda content: zipped(content, zipfile.ZIP_BZIP2),
    "lzma.zip": lambda content: zipped(content, zipfile.ZIP_LZMA),
}


@pytest.fixture
def expected(tmp_path):
    """What the small set is as a folder."""
    return taken(laid(tmp_path / "folder", SMALL))


@pytest.mark.parametrize("name", PACKERS)
def test_an_archive_holds_what_its_folder_holds(tmp_path, expected, name):
    (tmp_path / name).write_bytes(PACKERS[name](SMALL))
    assert taken(tmp_path / name) == expected


@pytest.mark.parametrize("name", PACKERS)
def test_a_damaged_byte_is_told_or_changes_nothing(tmp_path, expected, name):
    """400 places of each archive, its headers' above all, each with one bit and with all bits of a byte turned."""
    whole = PACKERS[name](SMALL)
    rng = random.Random(name)
    ends = [*range(min(80, len(whole))), *range(max(0, len(whole) - 160), len(whole))]
    headers = [at for at in range(0, len(whole), 512) for at in (at, at + 100, at + 124, at + 148, at + 156)]
    places = {*ends, *rng.sample(range(len(whole)), 120), *(headers if name == "data.tar" else [])}
    told = 0
    for at in sorted(place for place in places if place < len(whole)):
        for mask in (1 << rng.randrange(8), 0xFF):
            damaged = bytearray(whole)
            damaged[at] ^= mask
            (tmp_path / name).write_bytes(damaged)
            try:
                assert taken(tmp_path / name) == expected, f"byte {at} ^ {mask:#x}: other images without a word"
            except UserError:
                told += 1
    assert told > len(places) / 2, "most bytes of an archive matter"


@pytest.mark.parametrize("name", PACKERS)
def test_an_archive_cut_short_is_not_whole(tmp_path, name):
    whole = PACKERS[name](SMALL)
    end = len(whole.rstrip(b"\0")) if name == "data.tar" else len(whole)  # of a tar's end mark one block is enough
    for length in {*range(600, end, 97), end - 1, end - 9}:
        (tmp_path / name).write_bytes(whole[:length])
        assert "not a whole archive" in refused(tmp_path / name), length
    for length in (0, 1, 3, 30, 300):
        (tmp_path / name).write_bytes(whole[:length])
        assert str(tmp_path / name) in refused(tmp_path / name), length


@pytest.mark.parametrize("name", PACKERS)
def test_wholeness_is_told_before_the_layout(tmp_path, name):
    """A set whose layout is wrong too: what is told is that the archive is not whole."""
    content = {f"train/cat/{index}.png": encoded(pixels(index, (64, 64))) for index in range(4)}
    damaged = bytearray(PACKERS[name](content))
    middle = len(damaged) // 2 if name != "data.tar" else 512 * (len(damaged) // 1024)
    at = damaged.find(b"train/cat/2.png") if name == "data.tar" else middle
    damaged[at : at + 8] = bytes(byte ^ 0x5A for byte in damaged[at : at + 8])
    (tmp_path / name).write_bytes(damaged)
    assert "not a whole archive" in refused(tmp_path / name)


@pytest.mark.parametrize("tail", [b"x", b"\0" * 2000 + b"rest", gzip.compress(b"x", mtime=0)])
@pytest.mark.parametrize("name", ["data.tar", "data.tar.gz", "data.tar.bz2", "data.tar.xz"])
def test_bytes_after_the_end_are_not_whole(tmp_path, name, tail):
    (tmp_path / name).write_bytes(PACKERS[name](SMALL) + tail)
    assert "not a whole archive" in refused(tmp_path / name)


@pytest.mark.parametrize("name", ["data.tar", "data.tar.gz", "data.tar.bz2", "data.tar.xz"])
def test_zeros_after_the_end_are_padding(tmp_path, expected, name):
    (tmp_path / name).write_bytes(PACKERS[name](SMALL) + bytes(4096))
    assert taken(tmp_path / name) == expected


@pytest.mark.parametrize(("name", "squeeze"), [("x.tar.gz", gzip.compress), ("x.tar.bz2", bz2.compress)])
def test_archives_of_parallel_compressors_are_read_through(tmp_path, expected, name, squeeze):
    plain = tarred(SMALL)
    parts = [squeeze(plain[at : at + 3000]) for at in range(0, len(plain), 3000)]
    (tmp_path / name).write_bytes(b"".join(parts))
    assert taken(tmp_path / name) == expected
    broken = bytearray(b"".join(parts))
    broken[len(parts[0]) + 1] ^= 0xFF  # the second part's magic number: not padding, but the rest of the archive
    (tmp_path / name).write_bytes(broken)
    assert "not a whole archive" in refused(tmp_path / name)


def test_a_zip_whose_directory_hides_a_member_is_not_whole(tmp_path):
    """A comment's length that swallows the next entry: zipfile lists one image less, without a word."""
    content = bytearray(zipped(SMALL))
    entry = content.index(b"PK\1\2")
    (name_length,) = struct.unpack_from("<H", content, entry + 28)
    struct.pack_into("<H", content, entry + 32, 46 + name_length)
    (tmp_path / "data.zip").write_bytes(content)
    with zipfile.ZipFile(tmp_path / "data.zip") as archive:
        assert len(archive.infolist()) == len(SMALL) - 1
    assert f"{len(SMALL) - 1} of {len(SMALL)} members are listed" in refused(tmp_path / "data.zip")


# --- what is no archive of ours


ZSTANDARD = "needs Python 3.14; run `zstd -d` on it first" if sys.version_info < (3, 14) else "not a whole archive"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"7z\xbc\xaf\x27\x1c" + bytes(600), "is a .7z archive; unpack it"),
        (b"Rar!\x1a\x07\x01\x00" + bytes(600), "is a .rar archive; unpack it"),
        (lzma.compress(tarred(SMALL), lzma.FORMAT_ALONE), "is a .lzma archive"),
        (b"PAR1" + bytes(600), "is a Parquet file; write its images"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "pointer of Git LFS"),
        (b"\n<!DOCTYPE html><html></html>", "is a web page"),
        (b"", "is empty"),
        (b"hello" * 300, "is no archive that is known; give a folder, or a .tar"),
        (gzip.compress(b"hello" * 300, mtime=0), "holds no .tar"),
        (ONE, "is a single image"),
        (zipped({"arr_0.npy": b"\x93NUMPY"}), ".npz of NumPy arrays; write its images"),
        (zipped({"train.zip": zipped(SMALL)}), "name the archive itself"),
        (b"\x28\xb5\x2f\xfd\x20" + bytes(100), "zstandard without a check sum"),
        (lzma.compress(tarred(SMALL), check=lzma.CHECK_NONE), "xz without a check sum"),
        (b"\x28\xb5\x2f\xfd\x24" + bytes(100), ZSTANDARD),
    ],
)
def test_what_is_not_taken_is_named_with_the_way(tmp_path, content, words):
    (tmp_path / "data.tar.gz").write_bytes(content)
    assert words in refused(tmp_path / "data.tar.gz")


# --- hostile ones


def test_a_member_is_refused_by_its_announced_size_and_never_read(tmp_path, monkeypatch):
    monkeypatch.setattr(tree, "MEMBER_BYTES", 100_000)
    content = SMALL | {"train/cat/bomb.png": bytes(200_000)}
    for name in ("data.tar.gz", "data.zip"):
        (tmp_path / name).write_bytes(PACKERS[name](content))
        monkeypatch.setattr(images, "decode", lambda *_: pytest.fail("an image was read"))
        assert "train/cat/bomb.png has 0 MB, over the limit of 0" in refused(tmp_path / name)


def test_the_sum_of_the_members_is_limited(tmp_path, monkeypatch):
    monkeypatch.setattr(archive_members, "SUM_BYTES", 100_000)
    for name in ("data.tar.gz", "data.zip"):
        (tmp_path / name).write_bytes(PACKERS[name](SMALL | {"rest.bin": bytes(200_000)}))
        assert "when unpacked" in refused(tmp_path / name)


def test_headers_that_would_fill_the_memory_or_never_end(tmp_path):
    """A long name of 1 GB that is not there; a size below zero, which leads tarfile back to the same header."""
    for size in (b"%011o" % (1 << 30), b"\xff" * 8 + struct.pack(">i", -512)):
        header = bytearray(tarfile.TarInfo("././@LongLink").tobuf(tarfile.GNU_FORMAT))
        header[124 : 124 + len(size)] = size
        header[156:157] = tarfile.GNUTYPE_LONGNAME if size[0] != 0xFF else tarfile.REGTYPE
        header[148:156] = b"        "
        header[148:156] = b"%06o\0 " % sum(header)
        (tmp_path / "data.tar").write_bytes(bytes(header) + tarred(SMALL))
        assert "not a whole archive" in refused(tmp_path / "data.tar")


@pytest.mark.skipif(sys.version_info < (3, 14), reason="Python has zstandard from 3.14 on")
def test_zstandard_where_python_has_it(tmp_path, expected):
    from compression import zstd

    whole = zstd.compress(tarred(SMALL), options={zstd.CompressionParameter.checksum_flag: 1})
    (tmp_path / "data.tar.zst").write_bytes(whole)
    assert taken(tmp_path / "data.tar.zst") == expected
    for at in range(0, len(whole), 40):
        damaged = bytearray(whole)
        damaged[at] ^= 0x55
        (tmp_path / "data.tar.zst").write_bytes(damaged)
        assert str(tmp_path) in refused(tmp_path / "data.tar.zst")


def test_zlib_errors_are_what_the_damage_raises():
    """The errors that tarfile lets through are real ones: the tests above meet them."""
    with pytest.raises(zlib.error):
        zlib.decompressobj(31).decompress(b"\x1f\x8b\x08" + b"\xff" * 40)
    with pytest.raises(lzma.LZMAError):
        lzma.decompress(b"\xfd7zXZ\0" + b"\xff" * 40)
