"""The modes of communication by name: the values of `distributed.comm`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from k8scifar.exchange import formats
from k8scifar.exchange.all_reduce import AllReduce
from k8scifar.exchange.interface import DividesUpdates, Exchange
from k8scifar.exchange.local_sgd import LocalSGD, merge_local_sgd
from k8scifar.exchange.owner_exchange import OwnerExchange, merge_int8
from k8scifar.ranks.world import World

# How gradients travel, the most exact first.
GRADIENTS = {"allreduce": formats.Float32(), "bf16": formats.BFloat16(), "int8": formats.Int8()}
MODES = (*GRADIENTS, LocalSGD.name)
MERGES = {"int8": merge_int8, LocalSGD.name: merge_local_sgd}


def build(
    mode: str, every: int, world: World, ddp: DistributedDataParallel, optimizer: torch.optim.Optimizer
) -> Exchange:
    """The exchange of a mode, registered with DDP and the optimiser; a single rank needs only an all-reduce.

    `every`: steps between two averagings of local SGD.
    """
    divides = isinstance(optimizer, DividesUpdates)
    if divides:
        optimizer.compute_directions_by(None)  # a former mode's, from a trial
    if world.size == 1:
        return AllReduce("allreduce", torch.float32, world, ddp)
    if mode == LocalSGD.name:
        return LocalSGD(every, world, ddp, optimizer)
    form = GRADIENTS[mode]
    if divides or form.rounds:
        back = form if form.rounds else formats.BFloat16()
        return OwnerExchange(mode, form, back, world, ddp, optimizer)
    return AllReduce(mode, form.dtype, world, ddp)


def merge(saved: dict[str, Any], ddp: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    """Put the mean of what the former ranks carried into weights, momenta and gradients, which are the checkpoint's.

    Returns a sentence for the log; "" if they carried nothing.
    """
    return MERGES[saved["mode"]](saved, ddp, optimizer) if saved["mode"] in MERGES else ""
