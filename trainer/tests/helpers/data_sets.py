"""Small data sets of the kinds that people have, and what `read_tree` makes of them."""

from __future__ import annotations

import io
import tarfile
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from k8scifar.data.reading.images import read_tree
from k8scifar.errors import UserError


def pixels(seed: int, size: tuple[int, int] = (32, 32)) -> np.ndarray:
    """uint8 [height, width, 3] of noise."""
    return np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)


def encoded(image: Image.Image | np.ndarray, kind: str = "PNG", **options) -> bytes:
    out = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(out, kind, **options)
    return out.getvalue()


def files(classes=("cat", "dog"), train: int = 3, test: int = 2, names=("train", "test")) -> dict[str, bytes]:
    """{path: content} of a good little set of PNGs; no two images are the same."""
    return {
        f"{split}/{name}/{index}.png": encoded(pixels(1000 * number + 100 * (split == names[1]) + index))
        for split, count in zip(names, (train, test), strict=True)
        for number, name in enumerate(classes)
        for index in range(count)
    }


def laid(root: Path, content: dict[str, bytes]) -> Path:
    """The files as a folder."""
    for name, data in content.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def tarred(content: dict[str, bytes], mode: str = "w", **options) -> bytes:
    """The files as a tar."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode, **options) as archive:
        for name, data in content.items():
            add(archive, name, data)
    return out.getvalue()


def add(archive: tarfile.TarFile, name: str, data: bytes = b"", **fields) -> None:
    """Add one member."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in fields.items():
        setattr(info, key, value)
    archive.addfile(info, io.BytesIO(data))


def zipped(content: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    """The files as a zip."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as archive:
        for name, data in content.items():
            archive.writestr(zipfile.ZipInfo(name), data, compression)
    return out.getvalue()


def taken(path: Path) -> dict[str, list[list[bytes]]]:
    """{class name: its images in train, its images in test}, each image's bytes, in order."""
    classes, splits = read_tree(path)
    return {
        name: [[image.tobytes() for image in split.images[split.labels == label]] for split in splits.values()]
        for label, name in enumerate(classes)
    }


def refused(path: Path) -> str:
    """The one line of the refusal of what lies at `path`; fails where it is taken."""
    try:
        read_tree(path)
    except UserError as error:
        assert "\n" not in str(error)
        return str(error)
    raise AssertionError(f"{path} was taken")
