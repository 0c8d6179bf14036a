"""Formats of a matrix on the wire: float32, bfloat16, or int8 with one scale a row and error feedback.

Every format writes float32 [rows, columns] into bytes and reads them back. The rank that rounds to int8 keeps the
remainder in bfloat16, which loses 2^-9 of it, and adds it to the next matrix that it writes for this parameter.

Source of error feedback: Seide, Fu, Droppo, Li, Yu, 1-Bit Stochastic Gradient Descent (2014).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

ALIGNED = 16  # bytes; each piece of a message begins at a multiple, so that a view of it can have any type
TINY = 1e-30  # a row with a smaller scale is sent as zeros, because 1 / scale would overflow
CACHED_NUMBERS = 2**16  # numbers that are processed together: they stay in the cache


def padded(size: int) -> int:
    """Bytes of a piece in a message."""
    return -(-size // ALIGNED) * ALIGNED


class Float32:
    """Exact: 4 bytes a number."""

    rounds = False  # whether it keeps remainders
    dtype = torch.float32

    def size(self, rows: int, columns: int) -> int:
        """Bytes of a matrix."""
        return rows * columns * self.dtype.itemsize

    def write(self, matrix: torch.Tensor, factor: float, rest: torch.Tensor, out: torch.Tensor) -> None:
        """Write `factor` times a matrix into `out`, uint8 [size]; formats that round use `rest`."""
        torch.mul(matrix, factor, out=out.view(self.dtype).view_as(matrix))

    def add(self, sent: torch.Tensor, total: torch.Tensor) -> None:
        """Add a written matrix, uint8 [size], to `total`, float32 [rows, columns]."""
        total.add_(sent.view(self.dtype).view_as(total))

    def read(self, sent: torch.Tensor, out: torch.Tensor) -> None:
        """Copy a written matrix, uint8 [size], to `out`, float32 [rows, columns]."""
        out.copy_(sent.view(self.dtype).view_as(out))


class BFloat16(Float32):
    """Rounded to bfloat16: float32's range, 8 bits of precision."""

    dtype = torch.bfloat16

    def write(self, matrix: torch.Tensor, factor: float, rest: torch.Tensor, out: torch.Tensor) -> None:
        out = out.view(self.dtype).view_as(matrix)
        out.copy_(matrix if factor == 1.0 else matrix * factor)


class Int8(Float32):
    """Rounded to 255 values between a row's greatest magnitude and its negative; a float32 scale a row.

    A row with a value that is not finite stays not finite when it is read, and so does its remainder.
    """

    rounds = True

    def size(self, rows: int, columns: int) -> int:
        return padded(rows * columns) + 4 * rows

    def write(self, matrix: torch.Tensor, factor: float, rest: torch.Tensor, out: torch.Tensor) -> None:
        """`rest`: bfloat16 [rows, columns], the former remainder, which the new one replaces."""
        values, scales = self._parts(out, matrix)
        scratch = torch.empty(2, max(CACHED_NUMBERS, matrix.shape[1]), device=matrix.device)
        for rows in _blocks(matrix):
            whole, rounded = (part[: matrix[rows].numel()].view_as(matrix[rows]) for part in scratch)
            torch.add(matrix[rows], rest[rows], out=whole)
            scale = torch.linalg.vector_norm(whole, torch.inf, dim=1, keepdim=True).div_(127)
            inverse = torch.where(scale < TINY, 0.0, 1 / scale)
            torch.mul(whole, inverse, out=rounded).round_()
            values[rows].copy_(rounded)
            rest[rows].copy_(whole.addcmul_(rounded, scale, value=-1))
            torch.mul(scale, factor, out=scales[rows])

    def add(self, sent: torch.Tensor, total: torch.Tensor) -> None:
        values, scales = self._parts(sent, total)
        scratch = torch.empty(max(CACHED_NUMBERS, total.shape[1]), device=total.device)
        for rows in _blocks(total):
            piece = scratch[: total[rows].numel()].view_as(total[rows])
            total[rows].addcmul_(piece.copy_(values[rows]), scales[rows])

    def read(self, sent: torch.Tensor, out: torch.Tensor) -> None:
        values, scales = self._parts(sent, out)
        for rows in _blocks(out):
            out[rows].copy_(values[rows]).mul_(scales[rows])

    def _parts(self, message: torch.Tensor, matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of a message: int8 [rows, columns] and float32 [rows, 1]."""
        values = message[: matrix.numel()].view(torch.int8).view_as(matrix)
        return values, message[padded(matrix.numel()) :].view(torch.float32).view(-1, 1)


def _blocks(matrix: torch.Tensor) -> Iterator[slice]:
    """Slices of rows that hold about CACHED_NUMBERS each."""
    rows = max(1, CACHED_NUMBERS // matrix.shape[1])
    for first in range(0, len(matrix), rows):
        yield slice(first, first + rows)
