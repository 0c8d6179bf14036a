"""Owners compute updates: matrices are divided among the ranks, and their gradients may be sent to the owners only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from k8scifar.exchange import formats
from k8scifar.exchange.all_reduce import listen, reduce_in
from k8scifar.exchange.cost_model import divide_owners
from k8scifar.exchange.interface import Carried, DividesUpdates, Exchange
from k8scifar.exchange.layout import rows
from k8scifar.exchange.owners import Formats, Owners, move
from k8scifar.ranks.world import World, keeps

LARGE = 2**14  # numbers in a matrix that int8 rounds


class OwnerExchange(Exchange):
    """Each matrix has an owner, which computes what all ranks then receive.

    With Muon that is the matrix's direction, and only the owner holds its momentum. With SGD (int8) it is the mean
    gradient. One step with Muon between machines:

    1. During the backward pass, DDP calls `Owners.send` with each bucket: gradients start towards their owners.
    2. `Muon.step` calls `_compute_directions`. For each of its matrices an owner waits for the gradients, adds them
       up, computes the direction and starts sending it (`Owners.spread`).
    3. Every rank waits for all directions, and `Muon.step` applies them.

    On one machine and on GPUs an all-reduce replaces 1, unless the mode is int8, which keeps what it rounds off: each
    rank adds it to its next gradient, and an owner to its next result.
    """

    def __init__(
        self,
        name: str,
        there: formats.Float32,
        back: formats.Float32,
        world: World,
        ddp: DistributedDataParallel,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        self.name = self.label = name
        self.model = ddp
        self._world, self._optimizer = world, optimizer
        self._matrices = matrices_of(ddp, optimizer)
        self._formats = Formats(there, back, self._zeros(there), self._zeros(back))
        self._begun = False  # whether a change of owners has anything to move
        self._directs = isinstance(optimizer, DividesUpdates)
        if self._directs:
            self.owned = frozenset(self._matrices)
            optimizer.compute_directions_by(self._compute_directions)
        self.divide_updates([1.0] * world.size)
        apart = world.local_size < world.size and world.device.type == "cpu"
        to_owners = there.rounds or apart
        listen(ddp, self._send if to_owners else reduce_in(there.dtype, world))

    def _zeros(self, form: formats.Float32) -> dict[nn.Parameter, torch.Tensor]:
        """The remainders of a format that rounds before the first step, bfloat16 [out, n] for each matrix."""
        if not form.rounds:
            return {}
        kind: Any = {"dtype": torch.bfloat16, "device": self._world.device}
        return {parameter: torch.zeros(rows(parameter).shape, **kind) for parameter in self._matrices}

    def _send(self, state: None, bucket: torch.distributed.GradBucket) -> torch.futures.Future[torch.Tensor]:
        return self.owners.send(state, bucket)

    def divide_updates(self, speeds: Sequence[float]) -> None:
        cost = self._optimizer.cost if self._directs else nn.Parameter.numel
        costs = [cost(parameter) for parameter in self._matrices]
        ranks = divide_owners(costs, [parameter.numel() for parameter in self._matrices], speeds)
        if self._begun:
            self._move([{rank} for rank in ranks])
        self.owners = Owners(self._world, self._matrices, costs, ranks, self._formats, lambda part: self.mark(part))

    def _move(self, targets: list[set[int]]) -> None:
        """Copy what the owner of each matrix alone holds to these ranks; collective."""
        held: list[tuple[torch.Tensor, int, set[int]]] = []
        for parameter, target in zip(self._matrices, targets, strict=True):
            momentum = self._optimizer.state.get(parameter, {}).get("momentum_buffer") if self._directs else None
            for tensor in (momentum, self._formats.rest_back.get(parameter)):
                if tensor is not None:
                    held.append((tensor, self.owners.owner[parameter], target))
        if held:
            move(self._world, *map(list, zip(*held, strict=True)))

    def _compute_directions(self) -> None:
        """Replace each matrix's gradient by its direction; collective."""
        self._begun = True
        self.owners.spread(self._optimizer.direction)

    def after_backward(self, rehearsal: bool = False) -> None:
        if not self._directs:
            self._begun = True
            self.owners.spread(lambda parameter: parameter.grad.movedim(1, -1).flatten(1))
            return
        if self.at_once:
            self.owners.finish()
        if rehearsal:
            self.owners.spread(lambda parameter: self._optimizer.direction(parameter, rehearsal=True))

    def begin(self, equal: bool = True) -> None:
        self._begun = True

    def collect(self) -> None:
        if self._begun:
            keepers = {rank for rank in range(self._world.size) if keeps(self._world, rank)}
            self._move([keepers] * len(self._matrices))

    def carried(self) -> Carried:
        return Carried(list(self._formats.rest_back.values()), list(self._formats.rest_there.values()))


def matrices_of(ddp: nn.Module, optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """The matrices that have owners: those whose updates can be divided, else the large ones."""
    if isinstance(optimizer, DividesUpdates):
        return optimizer.hidden
    parameters = [parameter for parameter in ddp.parameters() if parameter.requires_grad]
    return [parameter for parameter in parameters if parameter.ndim > 1 and parameter.numel() >= LARGE]


@torch.no_grad()
def merge_int8(saved: dict[str, Any], ddp: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    """Add the remainders of gradients to the next step's gradients, and those of Muon's directions to the weights.

    Every rank adds the mean over the former ranks, so that the mean gradient contains it once.
    """
    matrices, rests = matrices_of(ddp, optimizer), saved["own"].float().mean(0)
    if len(rests) != sum(matrix.numel() for matrix in matrices):
        return ""  # the former optimiser had other matrices
    rates = {weight: group["lr"] for group in optimizer.param_groups for weight in group["params"]}
    sizes = [matrix.numel() for matrix in matrices]
    for matrix, rest, back in zip(matrices, rests.split(sizes), saved["shared"], strict=True):
        rows(matrix.grad).add_(rest.view_as(rows(matrix.grad)))
        directs = isinstance(optimizer, DividesUpdates)
        last = matrix.movedim(1, -1) if directs else matrix.grad.movedim(1, -1)
        last.add_(back.float().view_as(last), alpha=-rates[matrix] if directs else 1.0)
    return f"the next step adds what int8 had rounded off on {len(saved['own'])} ranks"
