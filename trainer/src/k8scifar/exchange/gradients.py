"""How the ranks combine what they learnt: plain all-reduce, and ways that send less where the wire is slow.

A mode says which model to call, hooks itself into DistributedDataParallel, and is asked after each backward
pass and after each optimiser step. Whatever the mode, the replicas are bit-identical at the end of every epoch; in all
modes but `local-sgd` after every step, where the ranks' processors round alike. What a mode carries from step to step
is in the checkpoint: once what all ranks share, and in one row for each rank what is its own.
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
from k8scifar.exchange import formats
from k8scifar.exchange.owners import Formats, Owners, divide, move, rows
from k8scifar.ranks.agree import average, gather, unflatten
from k8scifar.ranks.world import World, keeps

LARGE = 2**14  # numbers in a matrix that is worth rounding


@runtime_checkable
class SharesWork(Protocol):
    """An optimiser that steps some matrices in directions, whose computation can be divided among the ranks (Muon)."""

    @property
    def hidden(self) -> list[nn.Parameter]: ...

    def cost(self, parameter: nn.Parameter) -> float: ...

    def direction(self, parameter: nn.Parameter, rehearsal: bool = False) -> torch.Tensor: ...

    def share(self, direct: Callable[[], None] | None) -> None: ...

    def rehearse(self) -> None: ...


class AllReduce:
    """The mean of the float32 gradients, bucket by bucket while the backward pass still runs.

    Where the optimiser shares its work, each matrix has an owner, which alone has its momentum and computes its
    direction. Between machines the gradients go to their owners only; on one machine, on GPUs and for other optimisers
    DDP adds them up in its own way.
    """

    name = "allreduce"
    equal = True  # whether all ranks hold equal weights now
    equal_steps = True  # whether all ranks take equal steps, and so hold equal momenta but for those of `owned`
    shares_updates = True  # whether the ranks may divide the optimiser's work
    there: formats.Float32 = formats.Float32()  # how gradients travel to their owners, where they do
    back: formats.Float32 = formats.BFloat16()  # how directions come back

    def __init__(
        self,
        config: Config,
        world: World,
        ddp: DistributedDataParallel,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        self._world, self._ddp, self._optimizer = world, ddp, optimizer
        self.mark: Callable[[str], None] = lambda part: None  # of the step's clock
        self.at_once = False  # whether the gradients must be whole after the backward pass, not when they are needed
        self._parameters = [parameter for parameter in ddp.parameters() if parameter.requires_grad]
        self._directs = isinstance(optimizer, SharesWork) and self.shares_updates and world.size > 1
        self._matrices: list[nn.Parameter] = self._owned_matrices() if world.size > 1 else []
        self._formats = Formats(self.there, self.back, self._zeros(self.there), self._zeros(self.back))
        self._owners: Owners | None = None
        self._begun = False  # whether there is anything that a change of owners has to move
        self.divide_updates([1.0] * world.size)
        if isinstance(optimizer, SharesWork):
            optimizer.share(self._direct if self._directs else None)
        _listen(ddp, self._hook())

    def _owned_matrices(self) -> list[nn.Parameter]:
        """The matrices that have owners."""
        return self._optimizer.hidden if self._directs else []

    def _zeros(self, form: formats.Float32) -> dict[nn.Parameter, torch.Tensor]:
        """What a format that rounds has left over at the start, bfloat16 [out, n] of each matrix."""
        if not form.rounds:
            return {}
        kind: Any = {"dtype": torch.bfloat16, "device": self._world.device}
        return {parameter: torch.zeros(rows(parameter).shape, **kind) for parameter in self._matrices}

    def _hook(self) -> Callable[..., torch.futures.Future[torch.Tensor]]:
        """What is called with each bucket of gradients.

        Never DDP's own all-reduce: a process that has timed the wire could not go back to it, and it multiplies by
        1 / world size where `_reduce` divides: other bits at three ranks.
        """
        apart = self._world.local_size < self._world.size and self._world.device.type == "cpu"
        return self._send if self._matrices and apart else self._reduce

    def _send(self, _: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        return self._owners.send(_, bucket)

    def _reduce(self, _: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        buffer = bucket.buffer().div_(self._world.size)
        sent = dist.all_reduce(buffer.to(self.there.dtype), async_op=True).get_future()
        return sent.then(lambda done: buffer.copy_(done.value()[0]))

    @property
    def owned(self) -> set[nn.Parameter]:
        """The parameters whose momentum their owner alone has."""
        return set(self._matrices) if self._directs else set()

    def divide_updates(self, speeds: Sequence[float]) -> None:
        """Divide the matrices among the ranks by these speeds; collective, at the beginning or an epoch's end."""
        if not self._matrices:
            return
        costs = [
            self._optimizer.cost(parameter) if self._directs else parameter.numel() for parameter in self._matrices
        ]
        owners = divide(costs, [parameter.numel() for parameter in self._matrices], speeds)
        if self._begun:
            self._move([{owner} for owner in owners])
        mark = lambda part: self.mark(part)  # noqa: E731 - it is set later
        self._owners = Owners(self._world, self._matrices, costs, owners, self._formats, mark)

    def _move(self, targets: list[set[int]]) -> None:
        """Copy what the owner of each matrix alone has to these ranks; collective."""
        held: list[tuple[torch.Tensor, int, set[int]]] = []
        for parameter, target in zip(self._matrices, targets, strict=True):
            momentum = self._optimizer.state.get(parameter, {}).get("momentum_buffer") if self._directs else None
            for tensor in (momentum, self._formats.rest_back.get(parameter)):
                if tensor is not None:
                    held.append((tensor, self._owners.owner[parameter], target))
        if held:
            move(self._world, *map(list, zip(*held, strict=True)))

    def _direct(self) -> None:
        """Leave each matrix's direction in its gradient; collective."""
        self._begun = True
        self._owners.spread(self._optimizer.direction)

    @property
    def model(self) -> nn.Module:
        """What the loop calls: its backward pass starts the exchange of gradients, outside `ddp.no_sync()`."""
        return self._ddp

    @property
    def label(self) -> str:
        """The mode and its setting, for people."""
        return self.name

    def after_backward(self) -> None:
        """Finish the exchange of a step's gradients, but for what is waited for when it is needed; collective.

        Of a matrix that has an owner the owner alone has the mean.
        """
        if self.at_once:
            self.settle()

    def settle(self) -> None:
        """Wait until the mean gradients are where they belong; collective."""
        if self._owners:
            self._owners.settle()

    def owner(self, parameter: nn.Parameter) -> int | None:
        """The rank that owns a matrix; None where all ranks are alike."""
        return self._owners.owner.get(parameter) if self._owners else None

    def rehearse(self) -> None:
        """What follows the backward pass up to the optimiser's step, for its time alone; collective.

        Leaves other gradients and remainders.
        """
        self.after_backward()
        if self._directs:
            self._owners.spread(lambda parameter: self._optimizer.direction(parameter, rehearsal=True))

    def after_step(self, steps_in_epoch: int, epoch_ends: bool) -> None:
        """Called when `steps_in_epoch` optimiser steps of the epoch are done; collective."""

    def snapshot(self) -> dict[str, Any]:
        """What a resumed run needs, on the CPU; collective, and whole on the ranks that keep checkpoints only."""
        if self._begun and self._matrices:
            self._move([{rank for rank in range(self._world.size) if keeps(self._world, rank)}] * len(self._matrices))
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
        """Take over a snapshot, weights and optimiser being there already.

        False where it is of another mode or of other ranks: see `merge`, and `begin` after it.
        """
        self._begun = True
        shared, own, rows = self._shared(), self._own(), saved.get("own")
        width = sum(tensor.numel() for tensor in own)
        same = [tensor.shape for tensor in shared] == [tensor.shape for tensor in saved.get("shared", [])]
        if saved.get("mode") != self.name or not same or width != (0 if rows is None else rows.shape[1]):
            return False
        if rows is not None and len(rows) != self._world.size:
            return False
        for tensor, values in zip(shared, saved["shared"], strict=True):
            tensor.copy_(values)
        if rows is not None:
            unflatten(rows[self._world.rank], own)
        return True

    def begin(self) -> None:
        """Called when the weights are those that all ranks begin with, other than at step 0."""

    @classmethod
    def merge(cls, saved: dict[str, Any], ddp: nn.Module, optimizer: torch.optim.Optimizer) -> str:
        """Put the mean of what each of the former ranks carried into weights, momenta and gradients.

        Weights and momenta are the checkpoint's already. Returns a sentence for the log; "" where nothing was carried.
        """
        return ""

    def _average_weights(self) -> None:
        """Replace the weights by their mean over the ranks, float32; collective."""
        average(self._parameters, self._world, torch.float32)

    def _shared(self) -> list[torch.Tensor]:
        """What is carried from step to step, and equal on all ranks."""
        return []

    def _own(self) -> list[torch.Tensor]:
        """What is carried from step to step, and each rank's own; all of one type."""
        return []


class BFloat16(AllReduce):
    """Gradients rounded to bfloat16 (float32's range, 8 bits of precision): half the bytes."""

    name = "bf16"
    there = formats.BFloat16()


class Int8(AllReduce):
    """Large matrices as bytes with a scale a row, to their owners and back; what is rounded off is made good for later.

    Each rank adds what it rounded off a gradient to the next one, and an owner what it rounded off a result (Muon's
    direction, or the mean gradient) to the next. All that is not a large matrix is exact.
    """

    name = "int8"
    there = back = formats.Int8()

    def _owned_matrices(self) -> list[nn.Parameter]:
        return _rounded(self._ddp, self._optimizer)

    def _hook(self) -> Callable[..., torch.futures.Future[torch.Tensor]]:
        return self._send

    def after_backward(self) -> None:
        if self._directs:
            super().after_backward()
        else:
            self._begun = True
            self._owners.spread(lambda parameter: parameter.grad.movedim(1, -1).flatten(1))

    def _shared(self) -> list[torch.Tensor]:
        return list(self._formats.rest_back.values())

    def _own(self) -> list[torch.Tensor]:
        return list(self._formats.rest_there.values())

    @classmethod
    @torch.no_grad()
    def merge(cls, saved: dict[str, Any], ddp: nn.Module, optimizer: torch.optim.Optimizer) -> str:
        """What was rounded off gradients is added to the next step's; what was off Muon's directions, to the weights.

        Every rank adds the same, so that the mean gains it once.
        """
        matrices, rests = _rounded(ddp, optimizer), saved["own"].float().mean(0)
        if len(rests) != sum(matrix.numel() for matrix in matrices):
            return ""  # of another optimiser: its matrices are others
        rates = {weight: group["lr"] for group in optimizer.param_groups for weight in group["params"]}
        sizes = [matrix.numel() for matrix in matrices]
        for matrix, rest, back in zip(matrices, rests.split(sizes), saved["shared"], strict=True):
            rows(matrix.grad).add_(rest.view_as(rows(matrix.grad)))
            last = matrix.movedim(1, -1) if isinstance(optimizer, SharesWork) else matrix.grad.movedim(1, -1)
            factor = -rates[matrix] if isinstance(optimizer, SharesWork) else 1.0
            last.add_(back.float().view_as(last), alpha=factor)
        return f"what int8 had rounded off on {len(saved['own'])} ranks goes into the next step"


def _rounded(ddp: nn.Module, optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """The matrices that int8 rounds."""
    if isinstance(optimizer, SharesWork):
        return optimizer.hidden
    parameters = [parameter for parameter in ddp.parameters() if parameter.requires_grad]
    return [parameter for parameter in parameters if parameter.ndim > 1 and parameter.numel() >= LARGE]


def _listen(ddp: DistributedDataParallel, hook: Callable[..., torch.futures.Future[torch.Tensor]]) -> None:
    """Have `hook` called with each bucket, in place of one before: DDP itself takes a hook once and for all."""
    if not hasattr(ddp, "bucket_hooks"):
        ddp.bucket_hooks = []

        def call(_: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
            return ddp.bucket_hooks[-1](_, bucket)

        ddp.register_comm_hook(None, call)
    ddp.bucket_hooks[:] = [hook]


def _collect(row: torch.Tensor, world: World) -> torch.Tensor:
    """Every rank's `row` on the ranks that keep checkpoints, [world size, n]; on the others it may be empty."""
    if world.own_folders:
        return gather(row, world)
    rows = [torch.empty_like(row) for _ in range(world.size)] if world.is_main else None
    dist.gather(row, rows, group=world.host_group)
    return torch.stack(rows) if rows else torch.empty(0)
