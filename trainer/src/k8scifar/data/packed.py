"""The packed form of a data set: uint8 arrays and a manifest that vouches for them.

A folder holds ``{train,test}-{images,labels}-<digest>.npy`` and ``manifest.json``. Each file is written under a
temporary name, fsynced and renamed; its name carries its content's digest, and the manifest comes last, so that a
reader meets a whole copy or none, and two writers of the same data write the same files.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import math
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from k8scifar.errors import TrainingError, UserError
from k8scifar.files import TRANSIENT, write_atomically
from k8scifar.files import read as read_file

FORMAT = 1
MANIFEST = "manifest.json"
SPLITS = ("train", "test")


class Foreign(UserError):
    """A manifest.json of another program's."""


@dataclass(frozen=True)
class Split:
    """Images uint8 [n, height, width, 3] and labels int64 [n]."""

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Manifest:
    """What a packed data set is: where it came from, its classes, its training statistics, its files."""

    source: str
    classes: list[str]
    counts: dict[str, int]
    pixels: int
    mean: list[float]  # of the training split, a channel, in units of 0..1
    std: list[float]  # likewise
    files: dict[str, dict[str, Any]]  # "train-images" -> {name, sha256, bytes}
    format: int = FORMAT

    @property
    def fingerprint(self) -> str:
        """sha256 (first 16 hex digits) of the contents: equal for equal data, wherever it came from."""
        parts = [self.files[key]["sha256"] for key in sorted(self.files)] + self.classes
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def statistics(images: np.ndarray) -> tuple[list[float], list[float]]:
    """Mean and standard deviation a channel of uint8 [n, h, w, 3], in units of 0..1, by exact integer counts."""
    mean, std = [], []
    for channel in range(images.shape[-1]):
        counts = np.bincount(images[..., channel].ravel(), minlength=256).astype(np.float64)
        values = np.arange(256) / 255.0
        average = float((counts * values).sum() / counts.sum())
        mean.append(average)
        std.append(max(float(np.sqrt((counts * (values - average) ** 2).sum() / counts.sum())), 1e-6))
    return mean, std


def write(folder: Path, source: str, classes: list[str], splits: dict[str, Split]) -> Manifest:
    """Write both splits and, last, the manifest; returns it. Raises OSError (a full disk, no permission)."""
    files: dict[str, dict[str, Any]] = {}
    for split in SPLITS:
        for kind in ("images", "labels"):
            buffer = io.BytesIO()
            np.save(buffer, np.ascontiguousarray(getattr(splits[split], kind)))
            blob = buffer.getbuffer()
            digest = hashlib.sha256(blob).hexdigest()
            name = f"{split}-{kind}-{digest[:12]}.npy"
            write_atomically(folder / name, blob)
            files[f"{split}-{kind}"] = {"name": name, "sha256": digest, "bytes": len(blob)}
    mean, std = statistics(splits["train"].images)
    counts = {split: len(splits[split]) for split in SPLITS}
    manifest = Manifest(source, classes, counts, splits["train"].images.shape[1], mean, std, files)
    write_atomically(folder / MANIFEST, manifest_bytes(manifest))
    return manifest


def manifest_bytes(manifest: Manifest) -> bytes:
    """The content of its file."""
    return json.dumps(asdict(manifest), indent=1).encode()


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a packed folder, None where there is none.

    Raises Foreign where it is another program's, UserError where it is damaged, TrainingError where its volume fails.
    """
    path = folder / MANIFEST
    try:
        content = _content(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}; check the folder and its permissions") from None
    return parse_manifest(content, path)


def parse_manifest(content: bytes, path: Path | str) -> Manifest:
    """The manifest in the content of a file. Raises Foreign where it is another program's, UserError if damaged."""
    try:
        values = json.loads(content)
    except (ValueError, RecursionError):
        raise UserError(f"{path} is damaged; run `k8scifar prepare` again") from None
    if not isinstance(values, dict) or "format" not in values:
        raise Foreign(f"{path} is not K8sCIFAR's; choose another --data-dir, or remove the file")
    if values["format"] != FORMAT:
        raise UserError(f"{path} has format {values['format']!r}, not {FORMAT}; run `k8scifar prepare` again")
    try:
        manifest = Manifest(**values)
    except TypeError:
        raise UserError(f"{path} is damaged: it lacks keys, or has others; run `k8scifar prepare` again") from None
    if odd := _oddity(manifest):
        raise UserError(f"{path} is damaged: {odd}; run `k8scifar prepare` again")
    return manifest


def _oddity(manifest: Manifest) -> str:
    """What in a manifest is of another type or size than its readers rely on, "" where nothing is."""

    def whole(value: Any, least: int = 0) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value >= least

    classes, keys = manifest.classes, [f"{split}-{kind}" for split in SPLITS for kind in ("images", "labels")]
    if not isinstance(manifest.source, str):
        return "source is no text"
    if not isinstance(classes, list) or len(classes) < 2 or not all(isinstance(name, str) for name in classes):
        return "classes are no list of names"
    if not isinstance(manifest.counts, dict) or not all(whole(manifest.counts.get(split), 1) for split in SPLITS):
        return "counts are not the splits'"
    if not whole(manifest.pixels, 1):
        return "pixels is no size"
    for values in (manifest.mean, manifest.std):
        if (
            not isinstance(values, list)
            or len(values) != 3
            or not all(isinstance(value, float | int) and math.isfinite(value) for value in values)
        ):
            return "mean or std are not three numbers"
    if not isinstance(manifest.files, dict) or sorted(manifest.files) != sorted(keys):
        return "files are not the splits'"
    for key, entry in manifest.files.items():
        if (
            not isinstance(entry, dict)
            or not re.fullmatch(rf"{key}-[0-9a-f]+\.npy", str(entry.get("name")))
            or not re.fullmatch(r"[0-9a-f]{64}", str(entry.get("sha256")))
            or not whole(entry.get("bytes"))
        ):
            return f"files has no file for {key}"
    return ""


def read(folder: Path, manifest: Manifest, split: str) -> Split:
    """One split, each byte of it checked against the manifest.

    Raises UserError naming the file that is missing, cut short or altered, TrainingError where its volume fails.
    """
    images, labels = (_read_array(folder, manifest.files[f"{split}-{kind}"]) for kind in ("images", "labels"))
    count, pixels = manifest.counts[split], manifest.pixels
    if (images.dtype, images.shape) != (np.uint8, (count, pixels, pixels, 3)) or (
        (labels.dtype, labels.shape) != (np.int64, (count,))
    ):
        raise UserError(f"the {split} images in {folder} are not what its manifest says; run `k8scifar prepare` again")
    return Split(images, labels)


def damage(folder: Path, manifest: Manifest) -> str | None:
    """What is wrong with the files of a packed folder, None if nothing is."""
    try:
        for split in SPLITS:
            read(folder, manifest, split)
    except UserError as error:
        return str(error)
    return None


def remove_strays(folder: Path, manifest: Manifest) -> None:
    """Remove packed files of former data sets, and the beginnings of such; only for the one who alone writes here."""
    wanted = {entry["name"] for entry in manifest.files.values()}
    for split in SPLITS:
        for path in [*folder.glob(f"{split}-*-*.npy"), *folder.glob(f".{split}-*-*.npy.part")]:
            if path.name not in wanted:
                path.unlink(missing_ok=True)


def _content(path: Path) -> bytes:
    """A file's bytes. Raises TrainingError where its volume goes on failing, OSError otherwise."""
    try:
        return read_file(path)
    except OSError as error:
        if error.errno in TRANSIENT:
            raise TrainingError(f"data file {path} can't be read ({error.strerror}); look at its volume") from None
        raise


def _read_array(folder: Path, entry: dict[str, Any]) -> np.ndarray:
    path = folder / entry["name"]
    try:
        blob = _content(path)
    except OSError as error:
        what = "is missing" if error.errno == errno.ENOENT else f"can't be read ({os.strerror(error.errno or 0)})"
        raise UserError(f"data file {path} {what}; run `k8scifar prepare` again") from None
    if len(blob) != entry["bytes"]:
        raise UserError(
            f"data file {path} is damaged: {len(blob)} bytes instead of {entry['bytes']}; run `k8scifar prepare` again"
        )
    if hashlib.sha256(blob).hexdigest() != entry["sha256"]:
        raise UserError(f"data file {path} is damaged: its sha256 is not the manifest's; run `k8scifar prepare` again")
    try:
        return _parsed(bytearray(blob))
    except (ValueError, KeyError, EOFError):
        raise UserError(f"data file {path} is no array; run `k8scifar prepare` again") from None


def _parsed(blob: bytearray) -> np.ndarray:
    """The array of a .npy file's content, on that memory itself: np.load would copy it piece by piece."""
    header = io.BytesIO(memoryview(blob)[:4096])
    read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    shape, _, dtype = read_header[np.lib.format.read_magic(header)](header)
    return np.frombuffer(blob, dtype, offset=header.tell()).reshape(shape)
