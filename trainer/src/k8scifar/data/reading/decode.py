"""An image file's bytes as pixels: scaled, upright, opaque, RGB, whatever format and mode it comes in."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import struct
import warnings
import zlib
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageOps, features

from k8scifar.errors import UserError

PIXELS = 32
LIMIT = 1 << 27  # pixels of an image, 134 megapixels: at most 0.5 GB once it is decoded
STRIP = 1 << 22  # pixels that are converted at a time
DETAIL = 8  # a large image is first made smaller by averaging, to so many pixels for each wanted one

# torchvision's IMG_EXTENSIONS, and what else Pillow reads under names that cameras and browsers give.
_FORMATS = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "PNG": (".png",),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
    "GIF": (".gif",),
    "AVIF": (".avif",),
}


def _supported(kind: str) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an older Pillow does not know the name of the feature
        return kind not in ("WEBP", "AVIF") or bool(features.check(kind.lower()))


FORMATS = [kind for kind in _FORMATS if _supported(kind)]  # these only: an EPS would start Ghostscript
SUFFIXES = {suffix for kind in FORMATS for suffix in _FORMATS[kind]}

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # EXIF's orientation -> what turns it upright
_ALPHA = ("LA", "La", "PA", "RGBA", "RGBa")
_PAPER = (255, 255, 255, 255)  # what transparent images lie upon: white

# What Pillow has to say of a file is said in our one line.
logging.getLogger("PIL").addHandler(logging.NullHandler())
logging.getLogger("PIL").propagate = False


def decode(content: bytes, name: str, pixels: int = PIXELS) -> np.ndarray:
    """The first frame of an image of any size as uint8 [pixels, pixels, 3]: turned upright, its centre square, resized.

    More than 8 bits a channel are scaled to 8: 16-bit integers from 0..65535; 32-bit integers and floats from the
    smallest of 0..1 (floats only), 0..255, 0..65535, 0..(their highest value) that holds them. What is transparent
    becomes white.

    Raises UserError, naming the file that can't be read or has more than LIMIT pixels.
    """
    try:
        with _quiet(), Image.open(io.BytesIO(content), formats=FORMATS) as image:
            if image.width * image.height > LIMIT:
                raise UserError(
                    f"{name} has {image.width} x {image.height} = {image.width * image.height / 1e6:,.0f} megapixels, "
                    f"over the limit of {LIMIT / 1e6:.0f}; make it smaller"
                )
            if image.format == "PNG" and not _png_is_whole(content):
                raise ValueError("a chunk's check sum is not the chunk's")
            if min(image.size) >= 2 * DETAIL * pixels:
                image.draft(None, (DETAIL * pixels, DETAIL * pixels))  # JPEG alone: decoded at a fraction of its size
            with _muted() if image.format == "TIFF" else contextlib.nullcontext():
                image.load()
            rgb = _shrunk(image, pixels)
            rgb = rgb.transpose(_UPRIGHT[turned]) if (turned := _orientation(image)) in _UPRIGHT else rgb
            if rgb.size != (pixels, pixels):
                rgb = ImageOps.fit(rgb, (pixels, pixels), Image.Resampling.BICUBIC)
            return np.asarray(rgb)
    except UserError:
        raise
    except Exception:  # each of Pillow's formats raises what it likes: SyntaxError, struct.error, KeyError, ...
        raise UserError(f"{name} {_instead(content)}; replace or remove it") from None


def _instead(content: bytes) -> str:
    """What a file that is no image is."""
    if not content:
        return "is empty"
    if content.startswith(b"version https://git-lfs"):
        return "is a pointer of Git LFS, not the image (`git lfs pull` fetches it)"
    return "is not an image that can be read"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without Pillow's warnings, and without its own limit on an image's size, which has no good words for it."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


@contextlib.contextmanager
def _muted() -> Iterator[None]:
    """Without what libtiff writes to the standard error itself, of which Python knows nothing."""
    try:
        kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    except OSError:  # a process without a standard error
        yield
        return
    try:
        os.dup2(nothing, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)


def _png_is_whole(content: bytes) -> bool:
    """Whether the check sums of the chunks that make the pixels are right: Pillow does not look at all of them."""
    at = 8
    while at + 12 <= len(content):
        length, kind = struct.unpack_from(">I4s", content, at)
        end = at + 8 + length
        if kind in (b"IHDR", b"PLTE", b"tRNS", b"IDAT") and (
            end + 4 > len(content) or zlib.crc32(content[at + 4 : end]) != int.from_bytes(content[end : end + 4], "big")
        ):
            return False
        if kind == b"IEND":
            return True
        at = end + 4
    return False


def _orientation(image: Image.Image) -> int:
    """EXIF's orientation of a loaded image; 1, upright, where its EXIF can't be read, as viewers have it."""
    try:
        return int(image.getexif().get(0x0112, 1))
    except Exception:
        return 1


def _shrunk(image: Image.Image, pixels: int) -> Image.Image:
    """An image as RGB; a large one by strips, its centre square alone, smaller, so that little more memory is used."""
    white = _white(image)
    if image.width * image.height <= STRIP:
        return _rgb(image, white)
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    factor = max(1, side // (DETAIL * pixels))
    rows = max(1, STRIP // side // factor) * factor
    small = Image.new("RGB", (-(-side // factor), -(-side // factor)))
    for first in range(0, side, rows):
        box = (left, top + first, left + side, top + min(side, first + rows))
        small.paste(_rgb(image.crop(box), white).reduce(factor), (0, first // factor))
    return small


def _rgb(image: Image.Image, white: float) -> Image.Image:
    transparent = image.info.get("transparency")
    if white:
        values = np.asarray(image).astype(np.float32)
        grey = np.nan_to_num(values, nan=0.0, posinf=white) * (255 / white)
        if isinstance(transparent, int):
            grey[values == transparent] = 255
        return Image.fromarray(np.rint(np.clip(grey, 0, 255)).astype(np.uint8)).convert("RGB")
    if image.mode in _ALPHA or transparent is not None:
        over = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", over.size, _PAPER), over).convert("RGB")
    return image.convert("RGB")


def _white(image: Image.Image) -> float:
    """The value that is white where a channel has more than 8 bits; 0 where it has not."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return 65535.0
    if image.mode not in ("I", "F"):
        return 0.0
    highest = float(image.getextrema()[1])
    if not math.isfinite(highest):
        values = np.asarray(image)
        highest = float(values.max(initial=0.0, where=np.isfinite(values)))
    ranges = (1.0, 255.0, 65535.0) if image.mode == "F" else (255.0, 65535.0)
    return next((limit for limit in ranges if highest <= limit), highest)
