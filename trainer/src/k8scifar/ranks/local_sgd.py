"""Local SGD: each rank steps by itself, and the weights are averaged now and then."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from k8scifar.ranks.exchange import AllReduce


class LocalSGD(AllReduce):
    """Each rank steps on its own gradients; every few steps, and at the end of each epoch, the weights are averaged.

    Within an epoch the ranks send how far they have moved since the last averaging, rounded to bfloat16: half the
    bytes, and an error of 2^-9 of the movement. At the end of an epoch they send the weights whole.
    The averagings depend on the step alone, never on when a checkpoint is taken, so a checkpoint between two of them
    holds every rank's own weights. The momentum stays each rank's own.

    Source: Lin, Stich, Patel, Jaggi, Don't Use Large Mini-Batches, Use Local SGD (2018).
    """

    name = "local-sgd"
    equal_steps = False
    shares_updates = False

    def __init__(self, *parts: Any, every: int) -> None:
        super().__init__(*parts)
        self._every = every
        self._anchors = [parameter.detach().clone() for parameter in self._parameters]  # the weights last agreed upon

    @property
    def model(self) -> nn.Module:
        return self._ddp.module

    @property
    def label(self) -> str:
        return f"{self.name}, averaged every {self._every} steps"

    @torch.no_grad()
    def after_step(self, steps_in_epoch: int, epoch_ends: bool) -> None:
        self.equal = epoch_ends or steps_in_epoch % self._every == 0
        if epoch_ends:
            self._average_weights()
            torch._foreach_copy_(self._anchors, self._parameters)
        elif self.equal:
            self._average_movement()

    def _average_movement(self) -> None:
        """Replace the weights by the mean over the ranks, to bfloat16's precision of what they moved; collective."""
        moved = torch._foreach_sub(self._parameters, self._anchors)
        torch._foreach_div_(moved, self._world.size)
        flat = torch.cat([_as_stored(tensor).to(torch.bfloat16) for tensor in moved])
        self._world.pulse.arrive()
        dist.all_reduce(flat)
        for anchor, mean in zip(self._anchors, flat.split([tensor.numel() for tensor in moved]), strict=True):
            _as_stored(anchor).add_(mean)
        torch._foreach_copy_(self._parameters, self._anchors)

    def snapshot(self) -> dict[str, Any]:
        return super().snapshot() | {"every": self._every, "equal": self.equal}

    @torch.no_grad()
    def restore(self, saved: dict[str, Any]) -> bool:
        self.equal = saved.get("equal", True)  # decides what _own lists
        taken = super().restore(saved)
        if self.equal or not taken:
            torch._foreach_copy_(self._anchors, self._parameters)
            self.equal = True
        return taken

    def _shared(self) -> list[torch.Tensor]:
        return [] if self.equal else self._anchors

    def _own(self) -> list[torch.Tensor]:
        momenta = [self._optimizer.state[parameter].get("momentum_buffer") for parameter in self._parameters]
        own = [momentum for momentum in momenta if momentum is not None]
        if not self.equal:
            own += self._parameters
        return own


def _as_stored(tensor: torch.Tensor) -> torch.Tensor:
    """A dense tensor's values in the order in which memory holds them: a view, whatever the memory format."""
    return tensor.as_strided((tensor.numel(),), (1,))
