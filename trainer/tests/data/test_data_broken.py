"""Broken images are one line that names them: whatever is damaged, in every format."""

from __future__ import annotations

import random
import resource
import struct
import warnings
import zlib

import numpy as np
import pytest
from data_sets import encoded, files, laid, pixels, refused

from k8scifar.data.reading.decode import FORMATS, decode
from k8scifar.errors import UserError


def told(content: bytes) -> str:
    with pytest.raises(UserError) as caught:
        decode(content, "x.png")
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- broken ones


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "x.png is empty; replace or remove it"),
        (b"<!DOCTYPE html><html>", "x.png is not an image that can be read; replace or remove it"),
        (b"version https://git-lfs.github.com/spec/v1\noid x", "is a pointer of Git LFS"),
        (encoded(pixels(1, (200, 200)), "JPEG")[:3000], "not an image that can be read"),
        (encoded(pixels(1, (100, 100)), "WEBP")[:700], "not an image that can be read"),
        (encoded(pixels(1, (100, 100)), "TIFF", compression="tiff_lzw")[:-40], "not an image that can be read"),
    ],
)
def test_broken_files_are_one_line_without_a_warning(content, words, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert words in told(content)
    assert capfd.readouterr() == ("", "")


def test_a_png_with_a_damaged_chunk():
    content = bytearray(encoded(pixels(1, (400, 400))))
    at = content.index(b"IDAT", 100 + content.index(b"IDAT"))
    content[at : at + 4] = b"\xa9\x8a\xbc\x07"
    assert "not an image that can be read" in told(bytes(content))


def test_postscript_under_an_images_name_starts_nothing(monkeypatch):
    from PIL import EpsImagePlugin

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("Ghostscript was started"))
    page = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\nshowpage\n"
    assert "not an image that can be read" in told(page)
    for kind in ("ICO", "PCX", "TGA", "ICNS", "DDS"):
        assert "not an image that can be read" in told(encoded(pixels(1), kind))


EXTREMES = (b"\xff" * 4, b"\x7f\xff\xff\xff", b"\0" * 4, b"\xff\xff\0\0")
SEEDS = {
    "PNG": [("PNG", {}), ("PNG", {"transparency": (1, 2, 3)})],
    "JPEG": [("JPEG", {}), ("JPEG", {"progressive": True}), ("MPO", {})],
    "GIF": [("GIF", {})],
    "BMP": [("BMP", {})],
    "PPM": [("PPM", {})],
    "TIFF": [
        ("TIFF", {}),
        *(("TIFF", {"compression": name}) for name in ("tiff_lzw", "jpeg", "packbits", "tiff_deflate")),
    ],
    "WEBP": [("WEBP", {}), ("WEBP", {"lossless": True})],
    "AVIF": [("AVIF", {})],
}


def resealed(content: bytes) -> bytes:
    """A PNG whose chunks have right check sums again, so that the damage gets further."""
    made, at = content[:8], 8
    while at + 12 <= len(content):
        end = at + 8 + int.from_bytes(content[at : at + 4], "big")
        made += content[at:end] + struct.pack(">I", zlib.crc32(content[at + 4 : end]))
        at = end + 4
    return made


@pytest.mark.parametrize("kind", SEEDS)
def test_fuzz_gives_an_array_or_one_line(kind, capfd):
    """1,500 damaged files a format, with a fixed seed: bytes changed, cut, doubled, fields set to extremes."""
    if kind not in FORMATS:
        pytest.skip(f"this Pillow has no {kind}")
    rng = random.Random(kind)
    seeds = [encoded(pixels(3, (40, 24)), name, **options) for name, options in SEEDS[kind]]
    outcomes = {"array": 0, "line": 0}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(1500):
            content = bytearray(rng.choice(seeds))
            for _ in range(rng.choice((1, 1, 2, 8))):
                at = rng.randrange(min(len(content), rng.choice((64, 1 << 20))))
                match rng.randrange(5):
                    case 0:
                        content[at] ^= 1 << rng.randrange(8)
                    case 1:
                        content[at] = rng.randrange(256)
                    case 2:
                        content[at : at + 4] = rng.choice(EXTREMES)
                    case 3:
                        del content[at : at + rng.randrange(1, 40)]
                    case 4:
                        content[at:at] = content[at : at + rng.randrange(1, 40)]
                if not content:
                    break
            if kind == "PNG" and rng.random() < 0.8:
                content = resealed(bytes(content))
            try:
                array = decode(bytes(content), "x")
            except UserError as error:
                assert "\n" not in str(error)
                outcomes["line"] += 1
            else:
                assert (array.shape, array.dtype) == ((32, 32, 3), np.uint8)
                outcomes["array"] += 1
    assert min(outcomes.values()) > 20, outcomes
    assert capfd.readouterr() == ("", ""), "a library wrote to our log"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 6 << 20, "kilobytes: far below what headers ask for"


def test_a_broken_image_in_a_set_is_named_by_its_path(tmp_path):
    content = files() | {"train/cat/page.jpg": b"<!DOCTYPE html>"}
    said = refused(laid(tmp_path, content))
    assert "train/cat/page.jpg is not an image that can be read; replace or remove it" in said
