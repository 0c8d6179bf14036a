"""What a mode carries in a checkpoint: saving it, restoring it, and merging it for another number of ranks.

A checkpoint's `comm` holds `mode`, `shared` (tensors, once for all ranks), `own` ([former ranks, n], or None) and the
mode's settings.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from k8scifar.exchange.interface import Exchange
from k8scifar.ranks.agree import gather, unflatten
from k8scifar.ranks.world import World


def snapshot(exchange: Exchange, world: World) -> dict[str, Any]:
    """Copy what a resumed run needs to the CPU; collective, and complete only on ranks that write checkpoints."""
    exchange.collect()
    carried = exchange.carried()
    own = _gathered(_flat(carried.own).cpu(), world) if carried.own else None
    shared = [tensor.cpu().clone() for tensor in carried.shared]
    return {"mode": exchange.name, "shared": shared, "own": own} | carried.settings


@torch.no_grad()
def restore(exchange: Exchange, saved: dict[str, Any], world: World) -> bool:
    """Copy a snapshot into the exchange, after weights and optimiser are restored.

    Returns False for a snapshot of another mode or number of ranks; `modes.merge` reads that one.
    """
    exchange.begin(saved.get("equal", True))
    carried, rows = exchange.carried(), saved.get("own")
    shapes = [tensor.shape for tensor in carried.shared]
    found = None if rows is None else rows.shape
    expected = (world.size, sum(tensor.numel() for tensor in carried.own)) if carried.own else None
    same = found == expected and shapes == [tensor.shape for tensor in saved.get("shared", [])]
    if saved.get("mode") != exchange.name or not same:
        exchange.begin()
        return False
    for tensor, values in zip(carried.shared, saved["shared"], strict=True):
        tensor.copy_(values)
    if rows is not None:
        unflatten(rows[world.rank], carried.own)
    return True


@contextlib.contextmanager
def as_rank_0(exchange: Exchange, rows: torch.Tensor | None, world: World) -> Iterator[None]:
    """Within, this rank holds rank 0's own values; `rows` are a snapshot's."""
    own = exchange.carried().own
    if rows is None or world.is_main:
        yield
        return
    mine = _flat(own)
    unflatten(rows[0], own)
    yield
    unflatten(mine, own)


def _flat(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def _gathered(row: torch.Tensor, world: World) -> torch.Tensor:
    """Every rank's `row` on the ranks that write checkpoints, [world size, n]; on the others it may be empty."""
    if world.own_folders:
        return gather(row, world)
    rows = [torch.empty_like(row) for _ in range(world.size)] if world.is_main else None
    dist.gather(row, rows, group=world.host_group)
    return torch.stack(rows) if rows else torch.empty(0)
