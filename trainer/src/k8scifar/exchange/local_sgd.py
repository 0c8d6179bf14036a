"""Local SGD: each rank steps by itself, and the weights are averaged now and then."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from k8scifar.exchange.gradients import AllReduce
from k8scifar.exchange.owners import stored
from k8scifar.ranks.agree import unflatten
from k8scifar.ranks.world import World

BLOCK = 512  # numbers of a movement that share a scale
AT_ONCE = 128  # blocks that are worked on together: they stay in the cache


class LocalSGD(AllReduce):
    """Each rank steps on its own gradients; every few steps, and at the end of each epoch, the weights are averaged.

    Within an epoch the ranks send how far they have moved since the last averaging, that of the matrices in int8: a
    quarter of the bytes, and an error of about 1 % of the movement. At the end of an epoch they send the weights whole.
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
        """Replace the weights by the mean over the ranks, to the precision of `mean_in_bytes`; collective."""
        moved = torch._foreach_sub(self._parameters, self._anchors)
        vectors = [tensor for tensor in moved if tensor.ndim <= 1]
        flat = torch.cat(vectors)
        work = dist.all_reduce(flat, async_op=True)  # its round trips pass beside the others
        matrices = [stored(tensor) for tensor in moved if tensor.ndim > 1]
        means = mean_in_bytes(torch.cat(matrices), self._world).split([len(values) for values in matrices])
        for values, mean in zip(matrices, means, strict=True):
            values.copy_(mean)
        work.wait()
        unflatten(flat.div_(self._world.size), vectors)
        torch._foreach_add_(self._anchors, moved)
        torch._foreach_copy_(self._parameters, self._anchors)

    def snapshot(self) -> dict[str, Any]:
        return super().snapshot() | {"every": self._every, "equal": self.equal}

    @torch.no_grad()
    def restore(self, saved: dict[str, Any]) -> bool:
        self.equal = saved.get("equal", True)  # decides what _own lists
        taken = super().restore(saved)
        if self.equal or not taken:
            self.begin()
        return taken

    @torch.no_grad()
    def begin(self) -> None:
        self.equal = True
        torch._foreach_copy_(self._anchors, self._parameters)

    @classmethod
    @torch.no_grad()
    def merge(cls, saved: dict[str, Any], ddp: nn.Module, optimizer: torch.optim.Optimizer) -> str:
        """The weights, if the former ranks' differ, and the momenta are the means of theirs."""
        if saved["own"] is None:
            return ""
        own = cls._carried(list(ddp.parameters()), optimizer, saved["equal"])
        unflatten(saved["own"].mean(0), own)
        what = "momenta" if saved["equal"] else "weights and momenta"
        return f"the {what} of {len(saved['own'])} ranks in local SGD are averaged"

    def _shared(self) -> list[torch.Tensor]:
        return [] if self.equal else self._anchors

    def _own(self) -> list[torch.Tensor]:
        return self._carried(self._parameters, self._optimizer, self.equal)

    @staticmethod
    def _carried(parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer, equal: bool) -> list[torch.Tensor]:
        """The momenta and, unless all ranks hold the same, the weights."""
        momenta = [optimizer.state[parameter].get("momentum_buffer") for parameter in parameters]
        own = [momentum for momentum in momenta if momentum is not None]
        return own if equal else own + parameters


def mean_in_bytes(values: torch.Tensor, world: World) -> torch.Tensor:
    """About the mean over the ranks of float32 [n], the same bits on all of them; collective.

    Each rank adds up a part, which it receives in int8 and hands on in int8: of n numbers it sends 2 (1 - 1 / ranks) n
    bytes, half of an all-reduce in bfloat16. A value is off by up to 1/127 of the greatest in its block of BLOCK.
    """
    share = -(-len(values) // (BLOCK * world.size))  # blocks that a rank adds up
    padded = F.pad(values, (0, share * world.size * BLOCK - len(values)))
    sent = _packed(padded.view(-1, BLOCK))
    received = torch.empty_like(sent)
    world.pulse.arrive()
    dist.all_to_all_single(received, sent)
    parts = received.split(share)
    total = _unpacked(parts[0])
    for part in parts[1:]:
        total += _unpacked(part)
    mean = _packed(total.div_(world.size))
    everyone = [torch.empty_like(mean) for _ in range(world.size)]
    world.pulse.arrive()
    dist.all_gather(everyone, mean)
    return torch.cat([_unpacked(part) for part in everyone]).flatten()[: len(values)]


def _packed(blocks: torch.Tensor) -> torch.Tensor:
    """Float32 [n, BLOCK] as int8 [n, BLOCK + 4]: each value over its block's greatest, times 127, and that scale."""
    packed = torch.empty(len(blocks), BLOCK + 4, dtype=torch.int8, device=blocks.device)
    for part, out in zip(blocks.split(AT_ONCE), packed.split(AT_ONCE), strict=True):
        scales = part.abs().amax(1, keepdim=True) / 127  # five times as fast as the infinity norm
        out[:, :BLOCK].copy_(part.div(torch.where(scales == 0, 1.0, scales)).round_())
        out[:, BLOCK:].copy_(scales.view(torch.int8))
    return packed


def _unpacked(packed: torch.Tensor) -> torch.Tensor:
    """The float32 [n, BLOCK] of `_packed`; a block with a value that was not finite comes back as NaN."""
    blocks = torch.empty(len(packed), BLOCK, device=packed.device)
    for part, out in zip(packed.split(AT_ONCE), blocks.split(AT_ONCE), strict=True):
        scales = part[:, BLOCK:].contiguous().view(torch.float32)
        out.copy_(part[:, :BLOCK]).mul_(torch.where(scales.isfinite(), scales, torch.nan))
    return blocks
