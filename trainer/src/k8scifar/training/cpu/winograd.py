"""3x3 convolutions of stride 1 with a quarter to a half of the multiplications, in float32 on a CPU.

A tile of m x m output pixels takes (m + 2)^2 products a channel instead of 9 m^2, after images and weights are
transformed to values of polynomials at m + 1 points and at infinity. Each of the (m + 2)^2 positions is one matrix
product over the channels, for the tiles of all images. The rounding error is about 2e-6 of the result's norm; it is
2.5e-7 for the direct form in float32, and 2e-3 in bf16.

Source of the method: Winograd, Arithmetic Complexity of Computations (1980); Lavin and Gray, Fast Algorithms for
Convolutional Neural Networks (2015); of the points: Barabasz et al., Error Analysis and Improving the Accuracy of
Winograd Convolution for Deep Neural Networks (2018).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

POINTS = (0.0, 1.0, -1.0, 0.5, -2.0)  # a tile uses the first m + 1
AT_ONCE = 2**21  # bytes of transformed images that are computed together, so that they stay in a core's cache


def convolve(images: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Convolve with padding 1 in the weights' precision; differentiable.

    Args:
        images: [n, in channels, height, width], channels last, float; both sizes 2 or more.
        weight: [out channels, in channels, 3, 3], float32 or float64.

    Returns:
        [n, out channels, height, width] of the images' dtype, channels last.
    """
    return _Winograd.apply(images, weight)


class _Winograd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(images, weight)
        with torch.autocast("cpu", enabled=False):
            tiles = _Tiles(images.shape[2:], weight.dtype)
            return _convolve(images, tiles.of_weight(weight).transpose(1, 2), tiles)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        images, weight = ctx.saved_tensors
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        tiles = _Tiles(images.shape[2:], weight.dtype)
        of_images = of_weight = None
        with torch.autocast("cpu", enabled=False):
            if ctx.needs_input_grad[0]:  # the gradient, convolved with the kernel turned around
                of_images = _convolve(gradient, tiles.of_weight(weight.flip(2, 3)), tiles)
            if ctx.needs_input_grad[1]:
                of_weight = _of_weight(images, gradient, tiles)
        return of_images, of_weight


def _convolve(images: torch.Tensor, weights: torch.Tensor, tiles: _Tiles) -> torch.Tensor:
    """The convolution from transformed weights, [positions, in channels, out channels]; channels last."""
    rows = images.permute(0, 2, 3, 1)
    out = rows.new_empty(*rows.shape[:3], weights.shape[2])
    for part, place in tiles.parts(rows.shape[3], rows, out):
        place.copy_(tiles.pixels(torch.bmm(tiles.of_images(part), weights), len(part)))
    return out.permute(0, 3, 1, 2)


def _of_weight(images: torch.Tensor, gradient: torch.Tensor, tiles: _Tiles) -> torch.Tensor:
    """The gradient of the weights, [out channels, in channels, 3, 3], channels last."""
    rows, above = images.permute(0, 2, 3, 1), gradient.permute(0, 2, 3, 1)
    total = torch.zeros(tiles.positions, above.shape[3], rows.shape[3], dtype=tiles.dtype)
    for part, group in tiles.parts(rows.shape[3], rows, above):
        total.baddbmm_(tiles.of_gradient(group).transpose(1, 2), tiles.of_images(part))
    taps = (tiles.weights.T @ total.flatten(1)).view(3, 3, *total.shape[1:])
    return taps.permute(2, 3, 0, 1).contiguous(memory_format=torch.channels_last)


class _Tiles:
    """The tiles of images of one size, and the transforms between a tile's pixels and its positions."""

    def __init__(self, size: tuple[int, int], dtype: torch.dtype) -> None:
        self.size, self.dtype = size, dtype
        self.tile = tuple(map(edge, size))
        self.count = tuple(-(-whole // tile) for whole, tile in zip(size, self.tile, strict=True))
        self.spare = tuple(t * c - whole for t, c, whole in zip(self.tile, self.count, size, strict=True))
        self.positions = math.prod(tile + 2 for tile in self.tile)
        self.out, self.weights, self.inward = _matrices(*self.tile, dtype)

    def parts(self, channels: int, *rows: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
        """Split `rows`, each [n, ...], into parts of AT_ONCE bytes, for images of so many channels."""
        of_image = self.positions * math.prod(self.count) * channels * self.dtype.itemsize
        return zip(*(tensor.split(max(1, AT_ONCE // of_image)) for tensor in rows), strict=True)

    def of_weight(self, weight: torch.Tensor) -> torch.Tensor:
        """[out, in, 3, 3] -> [positions, out, in]."""
        return (self.weights @ weight.permute(2, 3, 0, 1).reshape(9, -1)).view(self.positions, *weight.shape[:2])

    def of_images(self, rows: torch.Tensor) -> torch.Tensor:
        """[n, height, width, channels] -> [positions, tiles, channels]."""
        n, *_, channels = rows.shape
        padded = F.pad(rows, (0, 0, 1, 1 + self.spare[1], 1, 1 + self.spare[0]))
        of_image, of_row, of_column, _ = padded.stride()
        windows = padded.as_strided(
            (self.tile[0] + 2, self.tile[1] + 2, n, *self.count, channels),
            (of_row, of_column, of_image, of_row * self.tile[0], of_column * self.tile[1], 1),
        )
        placed = torch.empty(windows.shape, dtype=self.dtype).copy_(windows)
        return (self.inward @ placed.view(self.positions, -1)).view(self.positions, -1, channels)

    def of_gradient(self, rows: torch.Tensor) -> torch.Tensor:
        """[n, height, width, channels] of the output -> [positions, tiles, channels]."""
        n, *_, channels = rows.shape
        whole = F.pad(rows, (0, 0, 0, self.spare[1], 0, self.spare[0])) if any(self.spare) else rows
        cut = whole.reshape(n, self.count[0], self.tile[0], self.count[1], self.tile[1], channels)
        cut = cut.permute(2, 4, 0, 1, 3, 5)
        placed = torch.empty(cut.shape, dtype=self.dtype).copy_(cut)
        return (self.out.T @ placed.view(math.prod(self.tile), -1)).view(self.positions, -1, channels)

    def pixels(self, products: torch.Tensor, n: int) -> torch.Tensor:
        """[positions, tiles, channels] -> [n, height, width, channels]."""
        tiles = (self.out @ products.flatten(1)).view(*self.tile, n, *self.count, -1).permute(2, 3, 0, 4, 1, 5)
        height, width = self.size
        return tiles.reshape(n, height + self.spare[0], width + self.spare[1], -1)[:, :height, :width]


def edge(size: int) -> int:
    """The tile's edge m, 2, 3 or 4, that takes the fewest products for an image of this many pixels."""
    return min((2, 3, 4), key=lambda tile: (-(-size // tile) * (tile + 2), tile))


@functools.cache
def _matrices(height: int, width: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The transforms of a tile's pixels [m^2, p], of the weights [p, 9], of the images [p, p], with p = (m + 2)^2."""
    return tuple(torch.kron(*pair).to(dtype) for pair in zip(_transforms(height), _transforms(width), strict=True))


def _transforms(tile: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The transforms in one dimension, float64: [m, m + 2], [m + 2, 3], [m + 2, m + 2]."""
    points = torch.tensor(POINTS[: tile + 1], dtype=torch.float64)
    powers = torch.zeros(tile + 2, tile + 2, dtype=torch.float64)
    powers[:-1] = points[:, None] ** torch.arange(tile + 2)
    powers[-1, -1] = 1.0  # infinity: the highest coefficient
    out, weights = powers[:, :tile].clone(), powers[:, :3].clone()
    out[-1, -1] = weights[-1, -1] = 1.0
    apart = points[:, None] - points + torch.eye(len(points), dtype=torch.float64)
    # The scale keeps the numbers small in all three.
    scale = torch.cat([apart.prod(1), torch.ones(1, dtype=torch.float64)])[:, None]
    return out.T, weights / scale, torch.linalg.inv(powers).T * scale
