"""Images of a folder or an archive, in torchvision's ImageFolder layout or as CIFAR-10's own batches, as arrays."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from k8scifar.console import say
from k8scifar.data.packed import Split
from k8scifar.data.reading import batches, layout
from k8scifar.data.reading.archives import opened
from k8scifar.data.reading.decode import PIXELS, decode
from k8scifar.data.reading.layout import Layout
from k8scifar.data.reading.tree import File, Place, Source, is_image, walk


def read_tree(path: Path, label: str = "") -> tuple[list[str], dict[str, Split]]:
    """Class names and both splits of a folder or an archive; says in a line what was taken and what was left.

    Classes are numbered in alphabetical order and samples come in the order of their paths, as torchvision has it.
    CIFAR-10's batches are recognised by their names. Raises UserError, beginning with `label` (default: the path),
    where the archive is not whole, the layout is another one or a file is no image; TrainingError where a volume fails.
    """
    label = label or f"imagefolder:{path}"
    with opened(path, label) as source:
        root = walk(source)
        if found := batches.find(root, label):
            return batches.read(source, found)[:2]
        chosen = layout.find(root, label)
        named = layout.classes(chosen, label)
        splits = _read(source, {split: [folders[split] for _, folders in named] for split in chosen.splits})
    say(_account(root, chosen, len(named)))
    return [name for name, _ in named], splits


def _read(source: Source, folders: dict[str, list[Place]]) -> dict[str, Split]:
    """The images of both splits, class by class; each is read, decoded and let go before the next."""
    files: dict[str, File] = {}
    targets: dict[str, tuple[str, int]] = {}
    labels: dict[str, list[int]] = {split: [] for split in folders}
    for split, classes in folders.items():
        for label, folder in enumerate(classes):
            for path, file in sorted(folder.images.items()):
                name = folder.name(path)
                files[name], targets[name] = file, (split, len(labels[split]))
                labels[split].append(label)
    images = {split: np.empty((len(labels[split]), PIXELS, PIXELS, 3), np.uint8) for split in folders}
    for name, content in source.contents(files):
        split, index = targets[name]
        images[split][index] = decode(content, f"{source.label}: {name}")
    return {split: Split(images[split], np.asarray(labels[split], np.int64)) for split in folders}


def _account(root: Place, chosen: Layout, classes: int) -> str:
    """What was taken and what was not, in one line."""
    counts = {split: sum(len(f.images) for f in place.folders.values()) for split, place in chosen.splits.items()}
    said = [f"took {counts['train']:,} train + {counts['test']:,} test images of {classes:,} classes"]
    for split, place in chosen.splits.items():
        name = place.path.rpartition("/")[2]
        if name.lower() != split:
            said.append(f"{name}/ is taken as {split}")
    if unused := layout.outside(root, chosen):
        said.append("not used: " + ", ".join(f"{top}/ ({_many(len(files))})" for top, files in unused.items()))
    left = []
    within = [place for split in chosen.splits.values() for place in split.below]
    if hidden := sum(place.hidden for place in root.below):
        left.append(f"{hidden:,} hidden")
    others = [name for place in within for name in place.files if not is_image(name)]
    if others:
        left.append(f"{len(others):,} by suffix ({layout.suffixes(others)})")
    if loose := sum(is_image(name) for split in chosen.splits.values() for name in split.files):
        left.append(f"{_many(loose)} outside of a class's folder")
    if loops := sum(place.loops for place in root.below):
        left.append(f"{loops:,} link{'s' * (loops > 1)} to a folder above")
    if lost := [place.name(name) for place in root.below for name in place.lost if place not in within]:
        left.append(f"{len(lost):,} that can't be read ({', '.join(lost[: layout.SHOWN])})")
    if left:
        said.append("left out: " + ", ".join(left))
    empty = [place.path for place in within if not place.images]
    if empty:
        more = " ..." if len(empty) > layout.SHOWN else ""
        said.append(f"folders without images: {', '.join(empty[: layout.SHOWN])}{more}")
    return "; ".join(said)


def _many(images: int) -> str:
    return f"{images:,} image{'s' * (images != 1)}"
