"""A procedural data set for machines without a network: learnable, deterministic, and not CIFAR-10.

Ten classes of texture: five ring and five checker patterns of rising frequency, each at a random place, in two random
colours, under noise. Mirroring and shifting an image keeps its class.
"""

from __future__ import annotations

import numpy as np

from k8scifar.data.packed import Split

FREQUENCIES = (1.5, 2.2, 3.0, 4.0, 5.2)  # periods an image width; the highest survives 16 pixels
CLASSES = [f"{kind}-{frequency}" for kind in ("rings", "checks") for frequency in FREQUENCIES]
PIXELS = 32


def split(count: int, seed: int) -> Split:
    """`count` images, uint8 [count, 32, 32, 3], and their labels int64 [count]; equal for equal arguments."""
    rng = np.random.Generator(np.random.PCG64(seed))
    labels = rng.permutation(np.arange(count, dtype=np.int64) % len(CLASSES))
    images = np.empty((count, PIXELS, PIXELS, 3), np.uint8)
    for first in range(0, count, 1000):
        images[first : first + 1000] = _paint(labels[first : first + 1000], rng)
    return Split(images, labels)


def _paint(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    n = len(labels)
    grid = np.arange(PIXELS, dtype=np.float32) / PIXELS
    centre = rng.random((n, 2, 1, 1), np.float32)
    y, x = grid[None, :, None] - centre[:, 0], grid[None, None, :] - centre[:, 1]
    frequency = np.asarray(FREQUENCIES, np.float32)[labels % len(FREQUENCIES)][:, None, None] * 2 * np.pi
    rings = np.cos(np.sqrt(x * x + y * y) * frequency)
    checks = np.cos(x * frequency) * np.cos(y * frequency)
    wave = np.where((labels < len(FREQUENCIES))[:, None, None], rings, checks)[..., None] * 0.5 + 0.5
    colours = rng.random((2, n, 1, 1, 3), np.float32)
    noise = rng.standard_normal((n, PIXELS, PIXELS, 3), np.float32) * 0.15
    image = colours[0] * wave + colours[1] * (1 - wave) + noise
    return (np.clip(image, 0, 1) * 255).astype(np.uint8)
