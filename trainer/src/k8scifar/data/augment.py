"""Augmentation of whole batches on the training device, keyed by (seed, epoch, sample).

Each draw is a hash of (seed, epoch, sample index, stream): it depends on no state, no batch and no world size. The
hash is a 32-bit integer finaliser with two multiplications (the "lowbias32" constants found by C. Wellons' search).
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

CHUNK = 64  # images that get their border together
_MASK = 0xFFFFFFFF
PLACE, CUT, HELD_OUT, SIDE = 1, 2, 3, 4  # streams: mirror and shift, cutout, who is held out, the first epoch's side


def _mix(x):
    """Finalise 32-bit values held in a Python int or an int64 tensor."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _MASK
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _MASK
    return x ^ (x >> 16)


def scalar_hash(seed: int, epoch: int, stream: int) -> int:
    """A 32-bit key of (seed, epoch, stream)."""
    return _mix((_mix((_mix(seed & _MASK) + epoch) & _MASK) ^ (stream * 0x9E3779B9 & _MASK)) & _MASK)


def draw(samples: torch.Tensor, seed: int, epoch: int, stream: int) -> torch.Tensor:
    """32 random bits for each of `samples` (int64 [n]), as int64 [n]."""
    key = scalar_hash(seed, epoch, stream)
    return _mix(_mix((samples + key) & _MASK) ^ (key >> 7))


def high(bits: torch.Tensor, below: int) -> torch.Tensor:
    """Integers in [0, below) from the upper 16 of 32 bits; uniform to 1 in 65,536 / below."""
    return ((bits >> 16) * below) >> 16


def low(bits: torch.Tensor, below: int) -> torch.Tensor:
    """Integers in [0, below) from bits 1 to 15; uniform to 1 in 32,768 / below."""
    return (((bits >> 1) & 0x7FFF) * below) >> 15


class Images:
    """A split on the training device, and batches of it.

    Args:
        images: uint8 [n, size, size, 3].
        labels: int64 [n].
        mean, std: a channel, in units of 0..1.
        border: largest shift that `augmented` will be asked for, pixels.
    """

    def __init__(
        self, images: torch.Tensor, labels: torch.Tensor, mean: list[float], std: list[float], border: int = 0
    ) -> None:
        self.labels = labels
        self.size = images.shape[1]
        self._border = border
        padded = _with_border(images, border) if border else images
        self._wide = wide = padded.shape[1]
        # Every row of every shifted image is a view, at any byte: one gather of rows makes a batch.
        self._rows = padded.as_strided((padded.numel() - self.size * 3 + 1, self.size * 3), (1, 1))
        self._row_starts = torch.arange(self.size, device=images.device) * (wide * 3)
        self._mean = (255.0 * torch.tensor(mean)).to(images.device)
        self._std = (255.0 * torch.tensor(std)).to(images.device)
        self._resize: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def __len__(self) -> int:
        return len(self.labels)

    def plain(self, samples: torch.Tensor, pixels: int, shift: int = 0) -> torch.Tensor:
        """Images as stored, or from `shift` pixels down and right on (at most `border` either way; the border is
        reflected), normalised: float32 [n, 3, pixels, pixels], channels last."""
        first = self._border + shift
        return self._finish(self._crop(samples, first, first).float(), pixels)

    def augmented(
        self,
        samples: torch.Tensor,
        pixels: int,
        *,
        seed: int,
        epoch: int,
        flip: bool | str,
        translate: int,
        cutout: int,
    ) -> torch.Tensor:
        """Images mirrored, shifted (the border reflected) and cut out at random, then resized.

        Args:
            samples: int64 [n], on the images' device.
            pixels: height and width of the result.
            flip: whether every other image is mirrored; "alternating": each in every other epoch, beginning by a hash
                of seed and image (source: Jordan, 94% on CIFAR-10 in 3.29 Seconds on a Single GPU, 2024).
            translate, cutout: pixels of the stored image; translate is at most `border`.

        Returns:
            float32 [n, 3, pixels, pixels], channels last.
        """
        span, first = 2 * translate + 1, self._border - translate
        bits = draw(samples, seed, epoch, PLACE)  # one hash for all three: on a GPU each operation is a launch
        batch = self._crop(samples, low(bits, span) + first, high(bits, span) + first)
        if flip == "alternating":
            batch = self._mirrored(batch, (draw(samples, seed, 0, SIDE) + epoch) & 1)
        elif flip:
            batch = self._mirrored(batch, bits & 1)
        batch = batch.float()
        if cutout:
            bits, places = draw(samples, seed, epoch, CUT), self.size - cutout + 1
            rows = _inside(low(bits, places), cutout, self.size)
            columns = _inside(high(bits, places), cutout, self.size)
            cut = rows[:, :, None] & columns.repeat_interleave(3, dim=1)[:, None, :]
            batch = torch.where(cut, self._mean.repeat(self.size), batch)
        return self._finish(batch, pixels)

    def _crop(self, samples: torch.Tensor, y: torch.Tensor | int, x: torch.Tensor | int) -> torch.Tensor:
        """uint8 [n, size, size * 3]: the samples from row y and column x of their bordered images on."""
        first = ((samples * self._wide + y) * self._wide + x) * 3
        rows = first[:, None] + self._row_starts
        return self._rows.index_select(0, rows.flatten()).view(-1, self.size, self.size * 3)

    def _mirrored(self, batch: torch.Tensor, which: torch.Tensor) -> torch.Tensor:
        """`batch`, the images where `which` is 1 mirrored."""
        shape = (-1, self.size, self.size, 3)
        if batch.is_cuda:  # how many there are would have to be waited for
            return torch.where(which.bool()[:, None, None], batch.view(shape).flip(2).view_as(batch), batch)
        order, count = which.argsort(stable=True), int(which.sum())  # gathers copy whole images, scatters bytes
        kept, turned = (batch.index_select(0, part) for part in order.split([len(order) - count, count]))
        turned = turned.view(shape).flip(2).view_as(turned)
        return torch.cat([kept, turned]).index_select(0, order.argsort())

    def _finish(self, batch: torch.Tensor, pixels: int) -> torch.Tensor:
        """Normalise and resize [n, size, size * 3], units 0..255: two products with small matrices."""
        scale, shift = (1 / self._std).repeat(self.size), (-self._mean / self._std)
        if pixels == self.size:
            batch = torch.addcmul(shift.repeat(self.size), batch, scale)
        else:
            rows, columns = self._resize_matrices(pixels)
            batch = torch.matmul(rows, batch) @ columns + shift.repeat(pixels)
        return batch.view(-1, pixels, pixels, 3).permute(0, 3, 1, 2)

    def _resize_matrices(self, pixels: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Antialiased bilinear resizing as matrices: rows [pixels, size], columns [size * 3, pixels * 3], over std."""
        if pixels not in self._resize:
            device = self._mean.device
            eye = torch.eye(self.size, device=device)[None, None]
            one = F.interpolate(eye, size=(pixels, self.size), mode="bilinear", antialias=True, align_corners=False)[
                0, 0
            ]
            self._resize[pixels] = one, torch.kron(one.T.contiguous(), torch.diag(1 / self._std))
        return self._resize[pixels]


def _with_border(images: torch.Tensor, border: int) -> torch.Tensor:
    """Images [n, size, size, 3] with a reflected border on all sides, the outermost pixels not repeated.

    By numpy, which copies short strided runs several times as fast as torch, and in chunks that fit a core's cache.
    """
    n, size = images.shape[:2]
    wide, end = size + 2 * border, size + border
    source, padded = images.cpu().numpy(), np.empty((n, wide, wide, 3), np.uint8)
    for at in range(0, n, CHUNK):
        part = padded[at : at + CHUNK]
        part[:, border:end, border:end] = source[at : at + CHUNK]
        rows = part[:, border:end]
        rows[:, :, :border] = rows[:, :, 2 * border : border : -1]
        rows[:, :, end:] = rows[:, :, end - 2 : size - 2 : -1]
        part[:, :border] = part[:, 2 * border : border : -1]
        part[:, end:] = part[:, end - 2 : size - 2 : -1]
    return torch.from_numpy(padded).to(images.device)


def _inside(first: torch.Tensor, length: int, size: int) -> torch.Tensor:
    """bool [n, size]: whether a row or column lies in [first, first + length)."""
    at = torch.arange(size, device=first.device)
    return (at >= first[:, None]) & (at < first[:, None] + length)
