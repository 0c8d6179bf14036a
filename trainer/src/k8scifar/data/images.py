"""Images from folders and archives in torchvision's ImageFolder layout, and single pictures."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from k8scifar.data.packed import SPLITS, Split
from k8scifar.errors import UserError

PIXELS = 32
SUFFIXES = {".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"}  # torchvision's IMG_EXTENSIONS


def decode(content: bytes, name: str, pixels: int = PIXELS) -> np.ndarray:
    """A picture of any size as uint8 [pixels, pixels, 3]: the centre square, resized.

    Raises UserError naming the file that is no picture.
    """
    try:
        with Image.open(io.BytesIO(content)) as image:
            rgb = image.convert("RGB")
    except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError):
        raise UserError(f"{name} is not a picture that can be read; replace or remove it") from None
    if rgb.size != (pixels, pixels):
        rgb = ImageOps.fit(rgb, (pixels, pixels), Image.Resampling.BICUBIC)
    return np.asarray(rgb)


def read_tree(path: Path, source: str = "") -> tuple[list[str], dict[str, Split]]:
    """Class names and both splits of a folder, or of a .tar or .tar.gz of one, holding train/ and test/.

    Classes are numbered in alphabetical order and samples come in the order of their paths, as torchvision has it.
    Raises UserError, naming `source` (default: the path), where the layout is another one or a file is no
    picture.
    """
    source = source or str(path)
    if not path.exists():
        raise UserError(f"imagefolder:{source}: there is no such file or folder; check the path")
    found: dict[tuple[str, str], list[tuple[str, np.ndarray]]] = {}
    for name, content in _walk(path, source):
        parts = PurePosixPath(name).parts
        at = next((index for index, part in enumerate(parts) if part in SPLITS), None)
        hidden = any(part.startswith(".") for part in parts)
        if at is None or len(parts) < at + 3 or hidden or PurePosixPath(name).suffix.lower() not in SUFFIXES:
            continue
        found.setdefault((parts[at], parts[at + 1]), []).append((name, decode(content, f"{source}: {name}")))
    names = {split: sorted(name for kind, name in found if kind == split) for split in SPLITS}
    for split in SPLITS:
        if not names[split]:
            raise UserError(f"imagefolder:{source} has no pictures under {split}/<class>/; both train/ and test/ must")
    if names["train"] != names["test"]:
        odd = sorted(set(names["train"]) ^ set(names["test"]))
        raise UserError(f"imagefolder:{source}: train/ and test/ differ in the classes {', '.join(odd[:5])}")
    if len(names["train"]) < 2:
        raise UserError(f"imagefolder:{source} has one class only; there must be two or more")
    return names["train"], {split: _pack(split, names[split], found) for split in SPLITS}


def _pack(split: str, classes: list[str], found: dict[tuple[str, str], list[tuple[str, np.ndarray]]]) -> Split:
    images, labels = [], []
    for label, name in enumerate(classes):
        samples = [image for _, image in sorted(found[split, name], key=lambda sample: sample[0])]
        images += samples
        labels += [label] * len(samples)
    return Split(np.stack(images), np.asarray(labels, np.int64))


def _walk(path: Path, source: str) -> Iterator[tuple[str, bytes]]:
    """(relative name, content) of each file, read in memory: nothing of an archive is unpacked to disk."""
    if path.is_dir():
        for file in sorted(path.rglob("*")):
            if file.is_file():
                yield file.relative_to(path).as_posix(), file.read_bytes()
        return
    try:
        with tarfile.open(path, "r:*") as archive:
            for member in archive:
                if member.isfile() and (content := archive.extractfile(member)):
                    yield member.name, content.read()
    except (tarfile.TarError, EOFError, OSError) as error:
        raise UserError(f"imagefolder:{source} is not a whole .tar or .tar.gz: {error}") from None
