"""Layouts of messages and of tensors: which bytes hold which matrix."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from k8scifar.exchange.formats import Float32, padded


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

    @classmethod
    def of_gradients(
        cls, parameters: Iterable[nn.Parameter], owner: dict[nn.Parameter, int], form: Float32, ranks: int
    ) -> Layout:
        """The messages of one bucket. A gradient goes to its owner in `form`; without one, to all ranks in float32."""
        layout = cls(ranks)
        for parameter in parameters:
            if parameter in owner:
                layout.add(owner[parameter], parameter, form.size(*rows(parameter).shape))
                continue
            for rank in range(ranks):
                layout.add(rank, parameter, 4 * parameter.numel())
        return layout

    @classmethod
    def of_results(cls, parts: list[list[nn.Parameter]], form: Float32) -> Layout:
        """The messages in which each rank (a part each) sends its results in `form`."""
        layout = cls(len(parts))
        for rank, part in enumerate(parts):
            for parameter in part:
                layout.add(rank, parameter, form.size(*rows(parameter).shape))
        return layout


def stored(tensor: torch.Tensor) -> torch.Tensor:
    """A view of a dense tensor's values in the order in which memory holds them, [n], in any memory format."""
    return tensor.as_strided((tensor.numel(),), (1,), tensor.storage_offset())


def rows(tensor: torch.Tensor) -> torch.Tensor:
    """A view of a dense weight or gradient as a matrix [out, n], each row in the order in which memory holds it."""
    return stored(tensor).view(len(tensor), -1)
