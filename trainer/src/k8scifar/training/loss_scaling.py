"""Loss scaling, for fp16: its gradients would underflow; bf16 and fp32 need none."""

from __future__ import annotations

import torch
import torch.distributed as dist

from k8scifar.ranks.world import World, wait_for_gpu

LEAST = 2.0**-10  # of the scale: gradients that overflow below it are no matter of fp16


def scaler(device: torch.device, precision: str) -> torch.amp.GradScaler:
    """A scaler, the same on all ranks; one that does nothing where precision is not fp16."""
    if precision != "fp16":
        return torch.amp.GradScaler(device.type, enabled=False)
    from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

    # GradScaler, whose finding of an overflow is summed over the ranks: under local SGD each has gradients of its own.
    return ShardedGradScaler(device.type, process_group=dist.group.WORLD)


def step(scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer, world: World) -> float | None:
    """One step of the optimiser; collective in fp16. Returns the new scale where it was left out, on all ranks."""
    if not scaler.is_enabled():
        optimizer.step()
        return None
    wait_for_gpu(world)
    before = scaler.get_scale()
    scaler.step(optimizer)
    scaler.update()
    after = scaler.get_scale()
    return after if after < before else None
