"""How the ranks combine what they learnt: plain all-reduce, and ways that send less where the wire is slow.

A mode says which model to call, hooks itself into DistributedDataParallel, and is asked after each backward
pass and after each optimiser step. Whatever the mode, the replicas are bit-identical at the end of every epoch; in all
modes but `local-sgd` after every step. What a mode carries from step to step is in the checkpoint: once what all
ranks share, and in one row for each rank what is its own.
"""

# No `from __future__ import annotations`: DistributedDataParallel reads a hook's annotations, not their text.
import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from k8scifar.config.schema import Config
from k8scifar.ranks.agree import average, gather, unflatten
from k8scifar.ranks.world import World


@runtime_checkable
class SharesWork(Protocol):
    """An optimiser whose work on the matrices can be divided among the ranks (Muon)."""

    def share(self, rank: int, speeds: Sequence[float], add: Callable[[torch.Tensor], None]) -> None: ...

    def rehearse(self) -> None: ...


class AllReduce:
    """The mean of the float32 gradients, bucket by bucket while the backward pass still runs: DDP's own way."""

    name = "allreduce"
    equal = True  # whether all ranks hold equal weights now
    equal_steps = True  # whether all ranks take equal steps, and so hold equal momenta
    shares_updates = True  # whether the ranks may divide the optimiser's work: two more bytes a weight and step

    def __init__(
        self,
        config: Config,
        world: World,
        ddp: DistributedDataParallel,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        self._world, self._ddp, self._optimizer = world, ddp, optimizer
        self.mark: Callable[[str], None] = lambda part: None  # of the step's clock
        self._parameters = [parameter for parameter in ddp.parameters() if parameter.requires_grad]
        self.divide_updates([1.0] * world.size)

    def divide_updates(self, speeds: Sequence[float]) -> None:
        """Divide the optimiser's work among the ranks by these speeds, where that is of this mode."""
        if self.shares_updates and isinstance(self._optimizer, SharesWork):
            self._optimizer.share(self._world.rank, speeds, self._add)

    @property
    def model(self) -> nn.Module:
        """What the loop calls: its backward pass starts the exchange of gradients, outside `ddp.no_sync()`."""
        return self._ddp

    @property
    def label(self) -> str:
        """The mode and its setting, for people."""
        return self.name

    def after_backward(self) -> None:
        """Finish the exchange of a step's gradients; collective."""

    def after_step(self, steps_in_epoch: int, epoch_ends: bool) -> None:
        """Called when `steps_in_epoch` optimiser steps of the epoch are done; collective."""

    def snapshot(self) -> dict[str, Any]:
        """What a resumed run needs, on the CPU; collective, and whole on the ranks that keep checkpoints only."""
        own = self._own()
        rows = _collect(torch.cat([tensor.detach().flatten() for tensor in own]).cpu(), self._world) if own else None
        return {"mode": self.name, "shared": [tensor.cpu().clone() for tensor in self._shared()], "own": rows}

    @contextlib.contextmanager
    def as_rank_0(self, rows: torch.Tensor | None) -> Iterator[None]:
        """Within, this rank holds what rank 0 does: `rows` are a snapshot's, of what is each rank's own."""
        own = self._own()
        if rows is None or self._world.is_main:
            yield
            return
        mine = torch.cat([tensor.detach().flatten() for tensor in own])
        unflatten(rows[0], own)
        yield
        unflatten(mine, own)

    @torch.no_grad()
    def restore(self, saved: dict[str, Any]) -> bool:
        """Take over a snapshot, weights and optimiser being there already; False where it is another mode's.

        After a change of the world size each rank takes the mean of the former ranks' rows.
        """
        shared, own, rows = self._shared(), self._own(), saved["own"]
        width = sum(tensor.numel() for tensor in own)
        same = [tensor.shape for tensor in shared] == [tensor.shape for tensor in saved["shared"]]
        if saved["mode"] != self.name or not same or width != (0 if rows is None else rows.shape[1]):
            return False  # other settings, which the user has accepted
        for tensor, values in zip(shared, saved["shared"], strict=True):
            tensor.copy_(values)
        if rows is not None:
            row = rows[self._world.rank] if len(rows) == self._world.size else rows.mean(0)
            unflatten(row, own)
        return True

    def _add(self, updates: torch.Tensor) -> None:
        """Replace the optimiser's updates by their sum over the ranks; collective."""
        self.mark("communication")
        self._world.pulse.arrive()
        dist.all_reduce(updates)
        self.mark("updates")

    def _average_weights(self) -> None:
        """Replace the weights by their mean over the ranks, float32; collective."""
        average(self._parameters, self._world, torch.float32)

    def _shared(self) -> list[torch.Tensor]:
        """What is carried from step to step, and equal on all ranks."""
        return []

    def _own(self) -> list[torch.Tensor]:
        """What is carried from step to step, and each rank's own; float32."""
        return []


class BFloat16(AllReduce):
    """All-reduce of gradients rounded to bfloat16 (float32's range, 8 bits of precision): half the bytes."""

    name = "bf16"

    def __init__(self, *parts: Any) -> None:
        super().__init__(*parts)
        self._ddp.register_comm_hook(None, self._send)

    def _send(self, _: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        buffer = bucket.buffer()
        rounded = (buffer / self._world.size).bfloat16()
        sent = dist.all_reduce(rounded, async_op=True).get_future()
        return sent.then(lambda done: buffer.copy_(done.value()[0]))


def _collect(row: torch.Tensor, world: World) -> torch.Tensor:
    """Every rank's `row` on the ranks that keep checkpoints, [world size, n]; on the others it may be empty."""
    if world.own_folders:
        return gather(row, world)
    rows = [torch.empty_like(row) for _ in range(world.size)] if world.is_main else None
    dist.gather(row, rows, group=world.host_group)
    return torch.stack(rows) if rows else torch.empty(0)
