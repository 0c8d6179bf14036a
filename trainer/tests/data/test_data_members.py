"""Members of archives: every kind that a packer writes is what unpacking makes of it, or named."""

from __future__ import annotations

import io
import os
import shutil
import stat
import subprocess
import tarfile
import zipfile

import numpy as np
import pytest
from data_sets import add, encoded, files, laid, pixels, refused, taken, zipped

from k8scifar.data.reading import tree

SMALL = files(train=2, test=1)


@pytest.fixture
def expected(tmp_path):
    """What the small set is as a folder."""
    return taken(laid(tmp_path / "folder", SMALL))


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
