"""Loss scaling for fp16, whose gradients would underflow; bf16 and fp32 need none."""

from __future__ import annotations

import torch
import torch.distributed as dist

from k8scifar.ranks.world import World, settle

LEAST = 2.0**-10  # smallest loss scale; an overflow below it means that training has diverged


def scaler(device: torch.device, precision: str) -> torch.amp.GradScaler:
    """A scaler, the same on all ranks; disabled unless the precision is fp16."""
    if precision != "fp16":
        return torch.amp.GradScaler(device.type, enabled=False)
    from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

    # GradScaler that detects an overflow on any rank: in local SGD the ranks' gradients differ.
    return ShardedGradScaler(device.type, process_group=dist.group.WORLD)


def step(scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer, world: World) -> float | None:
    """Take the optimiser's step; collective in fp16. Returns the new scale if all ranks skipped it, else None."""
    if not scaler.is_enabled():
        optimizer.step()
        return None
    settle(world)
    before = scaler.get_scale()
    scaler.step(optimizer)
    scaler.update()
    after = scaler.get_scale()
    return after if after < before else None
