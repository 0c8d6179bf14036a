"""Layouts of messages and of tensors: which bytes hold which matrix."""

from __future__ import annotations

import torch
from torch import nn

from k8scifar.exchange.formats import padded


class Layout:
    """The bytes of each parameter in the messages to, or from, each rank.

    Attributes:
        places: by rank, the bytes of each parameter in its message.
        lengths: by rank, the message's bytes.
    """

    def __init__(self, ranks: int) -> None:
        self.places: list[dict[nn.Parameter, slice]] = [{} for _ in range(ranks)]
        self.lengths = [0] * ranks

    def add(self, rank: int, parameter: nn.Parameter, size: int) -> None:
        """Append `size` bytes of a parameter to a rank's message."""
        begin = self.lengths[rank]
        self.places[rank][parameter] = slice(begin, begin + size)
        self.lengths[rank] += padded(size)


def stored(tensor: torch.Tensor) -> torch.Tensor:
    """A view of a dense tensor's values in the order in which memory holds them, [n], in any memory format."""
    return tensor.as_strided((tensor.numel(),), (1,), tensor.storage_offset())


def rows(tensor: torch.Tensor) -> torch.Tensor:
    """A view of a dense weight or gradient as a matrix [out, n], each row in the order in which memory holds it."""
    return stored(tensor).view(len(tensor), -1)
