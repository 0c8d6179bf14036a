"""Archives: whole or refused, whatever byte is damaged; and every kind of member that a packer writes."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import random
import shutil
import stat
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib

import numpy as np
import pytest
from data_sets import add, encoded, files, laid, pixels, refused, taken, tarred, zipped

from k8scifar.data import images, members, tree
from k8scifar.errors import UserError

SMALL = files(train=2, test=1)
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


@pytest.mark.parametrize("tail", [b"x", b"\0" * 2000 + b"rest", gzip.compress(b"x")])
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


LONG = "d" * 150
ONE, TWO = encoded(pixels(71)), encoded(pixels(72))


def link(archive, name, target, kind):
    add(archive, name, type=kind, linkname=target)


def put_small(archive, prefix=""):
    for name, data in SMALL.items():
        add(archive, prefix + name, data)


def sparse(archive):
    """A GNU sparse member as `tar --sparse` writes it: a BMP whose middle is a hole."""
    put_small(archive)
    info = tarfile.TarInfo("train/cat/sparse.bmp")
    info.type = tarfile.GNUTYPE_SPARSE
    stored = HOLED[:512] + HOLED[-512:]
    info.size = len(stored)
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    for number, (offset, size) in enumerate([(0, 512), (len(HOLED) - 512, 512)]):
        header[386 + 24 * number : 386 + 24 * number + 24] = b"%011o\0%011o\0" % (offset, size)
    header[483:495] = b"%011o\0" % len(HOLED)
    header[148:156] = b"        "
    header[148:156] = b"%06o\0 " % sum(header)
    archive.fileobj.write(bytes(header) + stored)
    archive.offset += 512 + len(stored)


def holed() -> bytes:
    array = pixels(5)
    array[4:28] = 0
    content = encoded(array, "BMP")
    assert len(content) == 3126
    return content[:512] + bytes(len(content) - 1024) + content[-512:]


HOLED = holed()
LARGE = encoded(np.vstack([np.full((20, 300, 3), 200, np.uint8), np.zeros((260, 300, 3), np.uint8)] * 2), "BMP")
LARGE = LARGE[:3000] + bytes(len(LARGE) - 6000) + LARGE[-3000:]
SYM, HARD = tarfile.SYMTYPE, tarfile.LNKTYPE
KINDS = {
    "hard links": (lambda a: (put_small(a), link(a, "train/cat/9.png", "train/cat/0.png", HARD)),
                   {"train/cat/9.png": SMALL["train/cat/0.png"]}),
    "symbolic links": (lambda a: (put_small(a), link(a, "train/cat/9.png", "../dog/1.png", SYM)),
                       {"train/cat/9.png": SMALL["train/dog/1.png"]}),
    "a link to a folder": (
        lambda a: (put_small(a), add(a, "disk/bird/0.png", ONE), add(a, "disk/bird2/0.png", TWO),
                   link(a, "train/bird", "../disk/bird", SYM),
                   link(a, "test/bird", "/disk/bird2", SYM)),
        {"train/bird/0.png": ONE, "test/bird/0.png": TWO}),
    "a later member of the same name": (
        lambda a: (put_small(a), add(a, "train/cat/0.png", ONE)), {"train/cat/0.png": ONE}),
    "a hard link keeps what is replaced later": (
        lambda a: (put_small(a), link(a, "train/cat/9.png", "train/cat/0.png", HARD), add(a, "train/cat/0.png", ONE)),
        {"train/cat/0.png": ONE, "train/cat/9.png": SMALL["train/cat/0.png"]}),
    "absolute names": (lambda a: put_small(a, "/home/me/data/"), {}),
    "names that lead above": (lambda a: put_small(a, "../../data/"), {}),
    "names with ./": (lambda a: put_small(a, "./"), {}),
    "long names": (lambda a: (put_small(a), add(a, f"train/cat/{LONG}.png", ONE)), {f"train/cat/{LONG}.png": ONE}),
    "a sparse member": (sparse, {"train/cat/sparse.bmp": HOLED}),
    "a loop of links": (lambda a: (put_small(a), link(a, "train/cat/again", "../../train", SYM)), {}),
}  # fmt: skip


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT], ids=["pax", "gnu"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_member_is_what_unpacking_makes_of_it(tmp_path, kind, form):
    build, more = KINDS[kind]
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as archive:
        build(archive)
    (tmp_path / "data.tar").write_bytes(out.getvalue())
    assert taken(tmp_path / "data.tar") == taken(laid(tmp_path / "folder", SMALL | more))


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda a: link(a, "train/cat/x.png", "nowhere.png", SYM), "train/cat/x.png is a link to nowhere.png"),
        (lambda a: link(a, "train/cat/x.png", "nowhere.png", HARD), "train/cat/x.png is a hard link to nowhere"),
        (lambda a: link(a, "train/cat/x.png", "x.png", SYM), "train/cat/x.png is a link to x.png"),
        (lambda a: link(a, "train/bird", "../nowhere", SYM), "train/bird is a link to ../nowhere"),
        (lambda a: add(a, "train/cat/x.png", type=tarfile.FIFOTYPE), "train/cat/x.png is neither a file nor a folder"),
        (lambda a: add(a, "train/cat/0.png/x.png", ONE), "lies in what is no folder"),
    ],
)  # fmt: skip
def test_members_that_cannot_be_taken_are_named(tmp_path, build, words):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        put_small(archive)
        build(archive)
    (tmp_path / "data.tar").write_bytes(out.getvalue())
    assert words in refused(tmp_path / "data.tar")


def test_links_that_multiply_are_cut_off(tmp_path, monkeypatch):
    """Each folder holds two links to the next: 2 ** 30 paths to one image."""
    monkeypatch.setattr(tree, "FILES", 5000)
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        put_small(archive)
        for level in range(30):
            for name in "ab":
                link(archive, f"levels/{level}/{name}", f"../{level + 1}", SYM)
        add(archive, "levels/30/x.png", ONE)
    (tmp_path / "data.tar").write_bytes(out.getvalue())
    assert "holds more than 5,000 files" in refused(tmp_path / "data.tar")


@pytest.mark.parametrize(
    "options", [["--format=v7"], ["--format=posix", "--sparse"], ["--format=gnu", "--sparse", "-P"]]
)
def test_what_gnu_tar_packs_of_links_and_holes(tmp_path, options):
    if not (tar := shutil.which("tar")):
        pytest.skip("needs tar")
    folder = laid(tmp_path / "set", SMALL | {"train/cat/holes.bmp": b""})
    with open(folder / "train" / "cat" / "holes.bmp", "wb") as file:
        file.write(LARGE[:3000])
        file.seek(len(LARGE) - 3000)
        file.write(LARGE[-3000:])
    os.link(folder / "train" / "cat" / "0.png", folder / "train" / "cat" / "twin.png")
    (folder / "train" / "cat" / "linked.png").symlink_to("../dog/1.png")
    command = [tar, *options, "-cf", tmp_path / "data.tar", "set"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"this tar can't: {done.stderr}")
    assert taken(tmp_path / "data.tar") == taken(folder)


# --- zips


def one_zip(tmp_path, build):
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        for name, data in SMALL.items():
            archive.writestr(zipfile.ZipInfo(name), data)
        build(archive)
    return tmp_path / "data.zip"


def test_a_zip_of_windows_and_of_a_mac(tmp_path, expected):
    """Backslashes; and UTF-8 that is not announced as such."""
    back = zipped(SMALL)
    for name in SMALL:
        back = back.replace(name.encode(), name.replace("/", "\\").encode())
    (tmp_path / "back.zip").write_bytes(back)
    assert taken(tmp_path / "back.zip") == expected
    renamed = {name.replace("cat", "cafxx"): data for name, data in SMALL.items()}
    (tmp_path / "mac.zip").write_bytes(zipped(renamed).replace(b"cafxx", "caf\u00e9".encode()))
    assert list(taken(tmp_path / "mac.zip")) == ["caf\u00e9", "dog"]
    (tmp_path / "dos.zip").write_bytes(zipped(renamed).replace(b"cafxx", b"caf\x82s"))
    assert list(taken(tmp_path / "dos.zip")) == ["caf\u00e9s", "dog"], "code page 437, the zips of old"


def test_a_zip_with_data_descriptors_zip64_and_links(tmp_path, expected):
    class Pipe(io.RawIOBase):
        """Where a zip can't go back to fill in sizes, as in `zip - | ...`."""

        def __init__(self):
            self.content = b""

        def writable(self):
            return True

        def write(self, data):
            self.content += bytes(data)
            return len(data)

    pipe = Pipe()
    with zipfile.ZipFile(pipe, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in SMALL.items():
            with archive.open(zipfile.ZipInfo(name), "w", force_zip64=True) as member:
                member.write(data)
    (tmp_path / "pipe.zip").write_bytes(pipe.content)
    assert taken(tmp_path / "pipe.zip") == expected

    linked = zipfile.ZipInfo("train/cat/9.png")
    linked.create_system, linked.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    path = one_zip(tmp_path, lambda archive: archive.writestr(linked, "../dog/0.png"))
    assert taken(path) == taken(laid(tmp_path / "folder", {"train/cat/9.png": SMALL["train/dog/0.png"]}))


def test_more_members_than_a_zip_of_old_can_count(tmp_path):
    content = SMALL | {f"notes/{number}.txt": b"" for number in range(66_000)}
    (tmp_path / "data.zip").write_bytes(zipped(content, zipfile.ZIP_STORED))
    assert taken(tmp_path / "data.zip") == taken(laid(tmp_path / "folder", SMALL))


def test_zips_that_cannot_be_unpacked_here_say_why(tmp_path):
    path = one_zip(tmp_path, lambda archive: None)
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\1\2") + 8] |= 1
    path.write_bytes(content)
    assert "train/cat/0.png is encrypted; unpack it with its password" in refused(path)
    path = one_zip(tmp_path, lambda archive: None)
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\1\2") + 10] = 9  # deflate64
    path.write_bytes(content)
    assert "train/cat/0.png can't be unpacked here" in refused(path)


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
        (gzip.compress(b"hello" * 300), "holds no .tar"),
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
    monkeypatch.setattr(members, "SUM_BYTES", 100_000)
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
