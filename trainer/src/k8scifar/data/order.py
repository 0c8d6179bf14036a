"""Which sample goes where: a stateless order, the same for every world size.

The order of an epoch is a permutation of (seed, epoch). It is cut into global batches, a global batch into
micro-batches, and the ranks take them in turn: the first so many of each global batch are rank 0's, the next so many
rank 1's. So the sequence of global batches, and what batch normalisation sees together, depends on no division.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from k8scifar.data.augment import scalar_hash


@dataclass(frozen=True)
class Order:
    """The samples of a training run: `count` images in global batches of micro-batches."""

    count: int
    global_batch: int
    micro_batch: int
    last_batch: str  # "drop" or "pad"
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """Global batches an epoch; 0 where `drop` leaves none."""
        if self.last_batch == "pad":
            return -(-self.count // self.global_batch)
        return self.count // self.global_batch

    def epoch(self, epoch: int) -> torch.Tensor:
        """Sample indices of one epoch, int64 [steps_per_epoch, micro-batches, micro_batch], on the CPU."""
        generator = torch.Generator().manual_seed(scalar_hash(self.seed, epoch, 0))
        order = torch.randperm(self.count, generator=generator)
        total = self.steps_per_epoch * self.global_batch
        if total > self.count:  # pad: round again from the epoch's first sample
            order = order.repeat(-(-total // self.count))
        return order[:total].view(self.steps_per_epoch, -1, self.micro_batch)

    def share(self, epoch: int, rank: int, counts: Sequence[int]) -> torch.Tensor:
        """One rank's part of `epoch`, int64 [steps_per_epoch, counts[rank], micro_batch].

        `counts`: micro-batches of a global batch by rank.
        """
        return self.epoch(epoch).split(list(counts), dim=1)[rank]
