"""Local SGD: each rank steps on its own gradients, and the weights are averaged every few steps."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from k8scifar.exchange.interface import Carried, Exchange
from k8scifar.exchange.layout import stored
from k8scifar.ranks.agree import average, unflatten
from k8scifar.ranks.world import World

SCALE_BLOCK = 512  # numbers of a movement that share a scale
CACHED_BLOCKS = 128  # blocks that are processed together: they stay in the cache


class LocalSGD(Exchange):
    """Each rank steps on its own gradients; every few steps, and at the end of each epoch, the weights are averaged.

    Within an epoch the ranks send how far their weights have moved since the last averaging. Matrices travel in int8: a
    quarter of the bytes, and an error of about 1 % of the movement. At the end of an epoch they send the weights in
    float32. The averagings depend on the step only, not on the checkpoints. A checkpoint between two of them holds
    every rank's own weights. Each rank keeps its own momentum.

    Source: Lin, Stich, Patel, Jaggi, Don't Use Large Mini-Batches, Use Local SGD (2018).
    """

    name = "local-sgd"
    equal_steps = False

    def __init__(
        self, every: int, world: World, ddp: DistributedDataParallel, optimizer: torch.optim.Optimizer
    ) -> None:
        self.label = f"{self.name}, averaged every {every} steps"
        self.model = ddp.module
        self._every, self._world, self._optimizer = every, world, optimizer
        self._parameters = [parameter for parameter in ddp.parameters() if parameter.requires_grad]
        self._anchors = [parameter.detach().clone() for parameter in self._parameters]  # the weights last averaged

    @torch.no_grad()
    def after_step(self, steps_in_epoch: int, epoch_ends: bool) -> None:
        self.equal = epoch_ends or steps_in_epoch % self._every == 0
        if epoch_ends:
            average(self._parameters, self._world, torch.float32)
            torch._foreach_copy_(self._anchors, self._parameters)
        elif self.equal:
            self._average_movement()

    def _average_movement(self) -> None:
        """Replace the weights by their mean over the ranks, to the precision of `mean_in_bytes`; collective."""
        moved = torch._foreach_sub(self._parameters, self._anchors)
        vectors = [tensor for tensor in moved if tensor.ndim <= 1]
        flat = torch.cat(vectors)
        work = dist.all_reduce(flat, async_op=True)  # its round trips overlap those of the matrices
        matrices = [stored(tensor) for tensor in moved if tensor.ndim > 1]
        means = mean_in_bytes(torch.cat(matrices), self._world).split([len(values) for values in matrices])
        for values, mean in zip(matrices, means, strict=True):
            values.copy_(mean)
        work.wait()
        unflatten(flat.div_(self._world.size), vectors)
        torch._foreach_add_(self._anchors, moved)
        torch._foreach_copy_(self._parameters, self._anchors)

    @torch.no_grad()
    def begin(self, equal: bool = True) -> None:
        self.equal = equal
        torch._foreach_copy_(self._anchors, self._parameters)

    def carried(self) -> Carried:
        own = _own(self._parameters, self._optimizer, self.equal)
        settings = {"every": self._every, "equal": self.equal}
        return Carried([] if self.equal else self._anchors, own, settings)


@torch.no_grad()
def merge_local_sgd(saved: dict[str, Any], ddp: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    """Average the former ranks' momenta and, if they differ, their weights."""
    if saved["own"] is None:
        return ""
    unflatten(saved["own"].mean(0), _own(list(ddp.parameters()), optimizer, saved["equal"]))
    what = "momenta" if saved["equal"] else "weights and momenta"
    return f"the {what} of {len(saved['own'])} ranks in local SGD are averaged"


def _own(parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer, equal: bool) -> list[torch.Tensor]:
    """The momenta and, unless all ranks hold equal ones, the weights."""
    momenta = [optimizer.state[parameter].get("momentum_buffer") for parameter in parameters]
    own = [momentum for momentum in momenta if momentum is not None]
    return own if equal else own + parameters


def mean_in_bytes(values: torch.Tensor, world: World) -> torch.Tensor:
    """Return the approximate mean over the ranks of float32 [n], the same bits on all of them; collective.

    Each rank receives a part in int8, adds it up and sends the mean in int8. For n numbers it sends 2 (1 - 1 / ranks) n
    bytes, half of an all-reduce in bfloat16. A value's error is at most 1/127 of the greatest in its block.
    """
    blocks = -(-len(values) // (SCALE_BLOCK * world.size))  # that a rank adds up
    padded = F.pad(values, (0, blocks * world.size * SCALE_BLOCK - len(values)))
    sent = _packed(padded.view(-1, SCALE_BLOCK))
    received = torch.empty_like(sent)
    world.heartbeats.arrive()
    dist.all_to_all_single(received, sent)
    parts = received.split(blocks)
    total = _unpacked(parts[0])
    for part in parts[1:]:
        total += _unpacked(part)
    mean = _packed(total.div_(world.size))
    everyone = [torch.empty_like(mean) for _ in range(world.size)]
    world.heartbeats.arrive()
    dist.all_gather(everyone, mean)
    return torch.cat([_unpacked(part) for part in everyone]).flatten()[: len(values)]


def _packed(blocks: torch.Tensor) -> torch.Tensor:
    """Float32 [n, SCALE_BLOCK] as int8 [n, SCALE_BLOCK + 4]: 127 times each value over its block's greatest."""
    packed = torch.empty(len(blocks), SCALE_BLOCK + 4, dtype=torch.int8, device=blocks.device)
    for part, out in zip(blocks.split(CACHED_BLOCKS), packed.split(CACHED_BLOCKS), strict=True):
        scales = part.abs().amax(1, keepdim=True) / 127  # five times as fast as the infinity norm
        out[:, :SCALE_BLOCK].copy_(part.div(torch.where(scales == 0, 1.0, scales)).round_())
        out[:, SCALE_BLOCK:].copy_(scales.view(torch.int8))
    return packed


def _unpacked(packed: torch.Tensor) -> torch.Tensor:
    """Undo `_packed`, to float32 [n, SCALE_BLOCK]; a block that had a value that is not finite becomes NaN."""
    blocks = torch.empty(len(packed), SCALE_BLOCK, device=packed.device)
    for part, out in zip(packed.split(CACHED_BLOCKS), blocks.split(CACHED_BLOCKS), strict=True):
        scales = part[:, SCALE_BLOCK:].contiguous().view(torch.float32)
        out.copy_(part[:, :SCALE_BLOCK]).mul_(torch.where(scales.isfinite(), scales, torch.nan))
    return blocks
