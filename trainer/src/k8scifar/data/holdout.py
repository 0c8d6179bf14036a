"""Training images held out: what settings are chosen on, so that the test images are read once, at the end.

Which images these are depends on the data set and on their number alone: a hash of an image's index, no seed. The mean
and the standard deviation that images are normalised by stay those of all training images.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from k8scifar.data.augment import HELD_OUT, draw
from k8scifar.data.packed import Manifest, Split, read
from k8scifar.errors import UserError


def left(manifest: Manifest, held: int) -> int:
    """How many images are trained on where `held` are held out, 0: all. Raises UserError where so many can't be."""
    images, classes = manifest.counts["train"], len(manifest.classes)
    if held and not classes <= held < images:
        raise UserError(
            f"data.holdout = {held}: of {images:,} training images of {classes} classes, {classes} to {images - 1:,} "
            "can be held out; set one of these, or 0 to evaluate on the test images"
        )
    return images - held


def chosen(labels: np.ndarray, held: int) -> np.ndarray:
    """Which `held` images of these int64 [n] labels are held out, bool [n]: of each class as many, or one more.

    A class that has too few gives all it has.
    """
    order = draw(torch.arange(len(labels)), 0, 0, HELD_OUT).argsort(stable=True).numpy()
    place = np.empty(len(labels), np.int64)  # of an image among those of its class
    for label in np.unique(labels):
        own = order[labels[order] == label]
        place[own] = np.arange(len(own))
    found = np.zeros(len(labels), bool)
    found[np.lexsort((labels, place))[:held]] = True  # the first of every class, then the second of every class ...
    return found


def splits(folder: Path, manifest: Manifest, held: int) -> tuple[Split, Split]:
    """The images to train on, and those to evaluate on: the test images, or the held-out ones, without reading those.

    Raises UserError, TrainingError as packed.read.
    """
    train = read(folder, manifest, "train")
    return divided(train, held) if held else (train, read(folder, manifest, "test"))


def divided(train: Split, held: int) -> tuple[Split, Split]:
    """The images that stay, and the held-out ones, each in the order of the whole."""
    out = chosen(train.labels, held)
    stay, go = (Split(train.images[part], train.labels[part]) for part in (~out, out))
    return stay, go
