"""Images of every mode and format as pixels: scaled, upright, opaque; and nothing but a sentence for what is broken."""

from __future__ import annotations

import struct
import subprocess
import sys
import textwrap
import zlib

import numpy as np
import pytest
from data_sets import encoded, files, laid, pixels
from PIL import Image

from k8scifar.cli import main
from k8scifar.data.reading.decode import FORMATS, LIMIT, SUFFIXES, decode
from k8scifar.data.reading.images import read_tree
from k8scifar.errors import UserError


def of(content: bytes) -> np.ndarray:
    array = decode(content, "x")
    assert array.shape == (32, 32, 3)
    assert array.dtype == np.uint8
    return array


def told(content: bytes) -> str:
    with pytest.raises(UserError) as caught:
        decode(content, "x.png")
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- modes


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
@pytest.mark.parametrize(("level", "mean"), [(10_000, 39), (50_000, 195), (65_535, 255), (0, 0), (200, 1)])
def test_16_bits_are_scaled_to_8(kind, level, mean):
    array = np.full((32, 32), level, np.uint16)
    content = b"P5 32 32 65535\n" + array.astype(">u2").tobytes() if kind == "PPM" else encoded(array, kind)
    assert (of(content) == mean).all()


def test_16_bit_classes_stay_apart_and_in_predict_too(tmp_path):
    """The microscope's set: dark is not bright, and neither is white."""
    from k8scifar.inference import predict

    assert predict.decode is decode, "one function for both"
    content = {}
    for split in ("train", "test"):
        for name, level in (("dark", 10_000), ("bright", 50_000)):
            noise = np.random.default_rng(0).integers(-4000, 4000, (32, 32))
            content[f"{split}/{name}/0.png"] = encoded((noise + level).astype(np.uint16))
    classes, splits = read_tree(laid(tmp_path, content))
    means = dict(zip(classes, splits["train"].images.mean((1, 2, 3)), strict=True))
    assert means["dark"] == pytest.approx(39, abs=1)
    assert means["bright"] == pytest.approx(195, abs=1)


def test_16_bit_big_endian_tiff():
    rows = np.full((32, 32), 50_000, ">u2").tobytes()
    tags = [
        (256, 3, 1, 32),
        (257, 3, 1, 32),
        (258, 3, 1, 16),
        (259, 3, 1, 1),
        (262, 3, 1, 1),
        (273, 4, 1, 8 + 2 + 8 * 12 + 4),
    ]
    tags += [(278, 3, 1, 32), (279, 4, 1, len(rows))]
    directory = struct.pack(">H", len(tags))
    for tag, kind, count, value in tags:
        directory += struct.pack(">HHI", tag, kind, count) + (
            struct.pack(">HH", value, 0) if kind == 3 else struct.pack(">I", value)
        )
    assert (of(b"MM\0\x2a\0\0\0\x08" + directory + bytes(4) + rows) == 195).all()


@pytest.mark.parametrize(
    ("dtype", "values", "expected"),
    [
        (np.float32, (0.0, 0.5, 1.0), (0, 128, 255)),
        (np.float32, (0.0, 100.0, 255.0), (0, 100, 255)),
        (np.float32, (0.0, 10_000.0, 65_535.0), (0, 39, 255)),
        (np.float32, (-5.0, 1.2e6, 2e6), (0, 153, 255)),
        (np.float32, (np.nan, 0.25, 1.0), (0, 64, 255)),
        (np.float32, (np.inf, 0.5, 1.0), (255, 128, 255)),
        (np.int32, (0, 100, 255), (0, 100, 255)),
        (np.int32, (0, 10_000, 65_535), (0, 39, 255)),
        (np.int32, (-7, 2**30, 2**31 - 1), (0, 128, 255)),
    ],
)
def test_32_bit_integers_and_floats_are_scaled_by_what_holds_them(dtype, values, expected):
    array = np.repeat(np.asarray(values, dtype), [8, 12, 12])[:, None].repeat(32, 1)
    got = of(encoded(array, "TIFF"))
    assert [int(got[row, 0, 0]) for row in (0, 10, 31)] == list(expected)


def test_alpha_is_laid_over_white():
    half = Image.new("RGBA", (32, 32), (200, 0, 100, 0))
    half.paste((0, 100, 0, 255), (0, 0, 32, 16))
    for kind in ("PNG", "WEBP", "TIFF"):
        got = of(encoded(half, kind, **({"lossless": True} if kind == "WEBP" else {})))
        assert got[4, 4].tolist() == [0, 100, 0], kind
        assert got[28, 4].tolist() == [255, 255, 255], kind
    assert of(encoded(Image.new("RGBA", (32, 32), (0, 0, 0, 51))))[0, 0].tolist() == [204, 204, 204]
    assert of(encoded(Image.new("LA", (32, 32), (9, 0))))[0, 0].tolist() == [255, 255, 255]


@pytest.mark.parametrize("mode", ["P", "L", "RGB", "1"])
def test_transparency_by_colour_is_laid_over_white(mode):
    image = Image.new(mode, (32, 32), 0)
    image.paste(1 if mode in ("P", "1") else (120,) * len(mode), (0, 0, 32, 16))
    if mode == "P":
        image.putpalette([9, 9, 9, 120, 120, 120] + [0] * 762)
    transparent = (0, 0, 0) if mode == "RGB" else 0
    got = of(encoded(image, transparency=transparent))
    assert got[28, 4].tolist() == [255, 255, 255]
    assert got[4, 4].tolist() == ([255] * 3 if mode == "1" else [120] * 3)


def test_16_bit_transparency_is_white():
    array = np.full((32, 32), 10_000, np.uint16)
    array[16:] = 300
    content = encoded(array)
    chunk = b"tRNS" + struct.pack(">H", 300)
    chunk = struct.pack(">I", 2) + chunk + struct.pack(">I", zlib.crc32(chunk))
    at = content.index(b"IDAT") - 4
    got = of(content[:at] + chunk + content[at:])
    assert got[[0, 31], 0, 0].tolist() == [39, 255]


@pytest.mark.parametrize(
    ("mode", "kind", "stored", "colour"),
    [
        ("CMYK", "JPEG", (55, 215, 215, 0), (200, 40, 40)),
        ("YCbCr", "JPEG", (92, 98, 205), (200, 47, 39)),
        ("L", "PNG", 200, (200, 200, 200)),
        ("1", "PNG", 1, (255, 255, 255)),
        ("P", "GIF", 7, (200, 40, 41)),
        ("LAB", "TIFF", (138, 128, 128), (129, 129, 129)),
    ],
)
def test_other_modes_keep_their_colour(mode, kind, stored, colour):
    image = Image.new(mode, (32, 32), stored)
    if mode == "P":
        image.putpalette([7] * 21 + [200, 40, 41] + [0] * 744)
    assert np.abs(of(encoded(image, kind)).astype(int) - colour).max() <= 3


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [(32, 32), (48, 64), (900, 1300)])
def test_exif_turns_upright(orientation, size):
    """Red on top, blue below, green at the left edge's top: all that an orientation can change."""
    upright = np.zeros((size[1], size[0], 3), np.uint8)
    upright[: size[1] // 2, :, 0] = 255
    upright[size[1] // 2 :, :, 2] = 255
    upright[: size[1] // 2, : size[0] // 4, 1] = 255
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Pillow's transposition that orientation undoes
    stored = Image.fromarray(upright)
    stored = stored.transpose(back[orientation]) if orientation in back else stored
    tag = Image.Exif()
    tag[0x0112] = orientation
    for kind in ("JPEG", "PNG", "WEBP", "TIFF"):
        got = of(encoded(stored, kind, exif=tag, **({"quality": 95} if kind == "JPEG" else {}))).astype(int)
        expected = of(encoded(upright)).astype(int)
        assert np.abs(got - expected).mean() < 8, kind


def test_broken_exif_is_no_broken_image():
    content = encoded(pixels(1), "JPEG", exif=b"Exif\0\0MM\0\x2a\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01")
    assert np.array_equal(of(content), of(encoded(pixels(1), "JPEG")))


@pytest.mark.parametrize(
    ("suffix", "kind"),
    [
        ("gif", "GIF"),
        ("jfif", "JPEG"),
        ("jpe", "JPEG"),
        ("pbm", "PPM"),
        ("avif", "AVIF"),
        ("JPG", "JPEG"),
        ("webp", "WEBP"),
    ],
)
def test_the_common_suffixes_are_taken(tmp_path, suffix, kind):
    if kind not in FORMATS:
        assert f".{suffix}" not in SUFFIXES
        pytest.skip(f"this Pillow has no {kind}")
    content = files() | {f"train/cat/x.{suffix}": encoded(pixels(7), kind)}
    _, splits = read_tree(laid(tmp_path, content))
    assert len(splits["train"]) == 7


def test_the_first_frame_counts_and_the_content_decides(tmp_path):
    frames = [Image.fromarray(np.full((32, 32, 3), level, np.uint8)) for level in (10, 200)]
    for kind, options in (("WEBP", {"lossless": True}), ("TIFF", {}), ("GIF", {}), ("PNG", {}), ("MPO", {})):
        moving = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert abs(int(of(moving).mean()) - 10) <= 1, kind


# --- sizes


@pytest.mark.parametrize("size", [(1, 1), (500, 3), (1, 700), (33, 32), (4000, 3000), (3000, 4001)])
def test_any_size_and_shape(size):
    image = Image.new("RGB", size, (200, 100, 50))
    for kind in ("PNG", "JPEG"):
        assert np.abs(of(encoded(image, kind)).astype(int) - [200, 100, 50]).max() <= 3


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_large_image_is_its_own_small_one(kind):
    """The centre square, averaged: a smooth image at 2,600 pixels is the one at 32."""
    x = np.linspace(0, 1, 2600)
    smooth = np.stack([np.outer(x, np.ones(2600)), np.outer(np.ones(2600), x), np.full((2600, 2600), 0.5)], -1)
    got = of(encoded((smooth * 255).astype(np.uint8), kind, **({"quality": 95} if kind == "JPEG" else {})))
    line = (np.arange(32) + 0.5) / 32 * 255
    expected = np.stack([np.outer(line, np.ones(32)), np.outer(np.ones(32), line), np.full((32, 32), 127.0)], -1)
    assert np.abs(got - expected).max() < 5


def png_header(width: int, height: int) -> bytes:
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    data = b"IDAT" + zlib.compress(b"")
    chunks = [struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part)) for part in (chunk, data)]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def test_too_many_pixels_have_a_sentence_of_their_own():
    said = told(png_header(14_000, 14_000))
    assert "x.png has 14000 x 14000 = 196 megapixels, over the limit of 134; make it smaller" in said
    assert "megapixels" not in told(png_header(11_000, 12_000)), "132 are under the limit: what is wrong is the rest"


def test_the_largest_images_stay_within_the_documented_memory():
    """A scan of 100 megapixels, in a process of its own: silence, and at most 4 bytes a pixel and 250 MB."""
    script = textwrap.dedent(
        """
        import io, re
        from pathlib import Path
        from PIL import Image
        from k8scifar.data.reading.decode import decode
        out = io.BytesIO()
        Image.new("1", (10_000, 10_000), 1).save(out, "PNG")
        assert decode(out.getvalue(), "x").min() == 255
        # Not getrusage: its maximum is inherited from the process that started this one.
        print(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
        """
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr == "", "no warning"
    assert int(done.stdout) * 1024 < 4 * LIMIT + (250 << 20)


def test_predict_reads_as_prepare_does(tmp_path, capsys):
    """A phone's photograph, 16 bits, transparency: the same answer as for the plain image; a broken one is a line."""
    import torch

    from k8scifar.config.sections import Model
    from k8scifar.results import weights as weights_file
    from k8scifar.training import model

    torch.manual_seed(0)
    weights = tmp_path / "model.safetensors"
    about = {
        "model": Model().model_dump(mode="json"),
        "classes": ["a", "b", "c"],
        "mean": [0.5] * 3,
        "std": [0.2] * 3,
        "pixels": 8,
    }
    weights_file.write(weights, model.build(Model(), 3).state_dict(), about)
    grey = np.arange(0, 256, 8, dtype=np.uint8)[:, None].repeat(32, 1)
    tag = Image.Exif()
    tag[0x0112] = 6
    clear = np.dstack([grey, np.full_like(grey, 255)])
    clear[grey == 0, 1], white = 0, np.where(grey == 0, 255, grey).astype(np.uint8)
    content = {
        "plain.png": encoded(grey),
        "deep.png": encoded(grey.astype(np.uint16) * 257),
        "turned.png": encoded(Image.fromarray(grey).transpose(Image.Transpose.ROTATE_90), exif=tag),
        "white.png": encoded(white),
        "clear.png": encoded(Image.fromarray(clear, "LA")),
    }
    laid(tmp_path, content)
    capsys.readouterr()
    assert main(["predict", str(weights), *(str(tmp_path / name) for name in content)]) == 0
    said = dict(line.split(": ") for line in capsys.readouterr().out.splitlines())
    plain, deep, turned, white, clear = (said[str(tmp_path / name)] for name in content)
    assert plain == deep == turned != white == clear
    (tmp_path / "middle.png").write_bytes(content["plain.png"].replace(b"IDAT", b"\xa9\x8a\xbc\x07"))
    assert main(["predict", str(weights), str(tmp_path / "middle.png")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"k8scifar: error: {tmp_path}/middle.png is not an image that can be read; replace or remove it"
