"""Augmentation of whole batches on the training device, keyed by (seed, epoch, sample).

Each draw is a hash of (seed, epoch, sample index, stream): it depends on no state, no batch and no world size. The
hash is a 32-bit integer finaliser with two multiplications (the "lowbias32" constants found by C. Wellons' search).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

_MASK = 0xFFFFFFFF
FLIP, SHIFT_Y, SHIFT_X, CUT_Y, CUT_X = range(1, 6)  # streams


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


def draw(samples: torch.Tensor, below: int, seed: int, epoch: int, stream: int) -> torch.Tensor:
    """Integers in [0, below), one for each of `samples` (int64 [n]); int64 [n]."""
    if below <= 1:
        return torch.zeros_like(samples)
    key = scalar_hash(seed, epoch, stream)
    return (_mix(_mix((samples + key) & _MASK) ^ (key >> 7)) * below) >> 32


class Pictures:
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
        at = _reflect(torch.arange(-border, self.size + border, device=images.device), self.size)
        padded = images.index_select(1, at).index_select(2, at) if border else images
        n, wide = padded.shape[:2]
        stride = (wide * wide * 3, wide * 3, 3, wide * 3, 1)
        # Every shifted picture is a view: one gather of contiguous rows makes a batch.
        self._windows = padded.as_strided((n, 2 * border + 1, 2 * border + 1, self.size, self.size * 3), stride)
        self._mean = (255.0 * torch.tensor(mean)).to(images.device)
        self._std = (255.0 * torch.tensor(std)).to(images.device)
        self._resize: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def __len__(self) -> int:
        return len(self.labels)

    def plain(self, samples: torch.Tensor, pixels: int) -> torch.Tensor:
        """Pictures as stored, normalised: float32 [n, 3, pixels, pixels], channels last."""
        return self._finish(self._windows[samples, self._border, self._border].float(), pixels)

    def augmented(
        self, samples: torch.Tensor, pixels: int, *, seed: int, epoch: int, flip: bool, translate: int, cutout: int
    ) -> torch.Tensor:
        """Pictures mirrored, shifted (the border reflected) and cut out at random, then resized.

        Args:
            samples: int64 [n], on the pictures' device.
            pixels: height and width of the result.
            translate, cutout: pixels of the stored picture; translate is at most `border`.

        Returns:
            float32 [n, 3, pixels, pixels], channels last.
        """
        span, first = 2 * translate + 1, self._border - translate
        dy = draw(samples, span, seed, epoch, SHIFT_Y) + first
        dx = draw(samples, span, seed, epoch, SHIFT_X) + first
        batch = self._windows[samples, dy, dx]
        if flip:
            mirror = draw(samples, 2, seed, epoch, FLIP).nonzero().squeeze(1)
            shape = (-1, self.size, self.size, 3)
            batch[mirror] = batch[mirror].view(shape).flip(2).view(-1, self.size, self.size * 3)
        batch = batch.float()
        if cutout:
            rows = _inside(draw(samples, self.size - cutout + 1, seed, epoch, CUT_Y), cutout, self.size)
            columns = _inside(draw(samples, self.size - cutout + 1, seed, epoch, CUT_X), cutout, self.size)
            cut = rows[:, :, None] & columns.repeat_interleave(3, dim=1)[:, None, :]
            batch = torch.where(cut, self._mean.repeat(self.size), batch)
        return self._finish(batch, pixels)

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


def _reflect(index: torch.Tensor, size: int) -> torch.Tensor:
    """Fold indices that leave [0, size) back, the border itself not repeated."""
    last = size - 1
    return last - (last - index.abs()).abs()


def _inside(first: torch.Tensor, length: int, size: int) -> torch.Tensor:
    """bool [n, size]: whether a row or column lies in [first, first + length)."""
    at = torch.arange(size, device=first.device)
    return (at >= first[:, None]) & (at < first[:, None] + length)
