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


class PowerSGD(AllReduce):
    """Each gradient matrix M as a product of rank r, what is lost of it added to the next step's.

    Rank i holds M_i, its gradient plus its remainder. With Q of the step before, all reduce P = mean of M_i^T Q
    (during the backward pass, together with what is not worth compressing), make P's columns orthonormal, reduce
    Q = mean of M_i P, and take Q P^T for the mean of M_i; the remainder M_i - Q P^T stays on rank i. P is the longer
    factor, so that what follows the backward pass is short. A hook that starts the second all-reduce from the
    first one's callback, as torch's own does, may start it at another place among the buckets on each rank, and
    gloo pairs collectives by their order; here both are started in program order.

    The orthonormal factors are each rank's own work, whose last bits differ between unlike CPUs; so the weights are
    averaged at the end of each epoch, which changes nothing where they are equal.

    Source: Vogels, Karimireddy, Jaggi, PowerSGD (2019), algorithm 1 and 2, with warm start.
    """

    name = "powersgd"
    shares_updates = False

    def __init__(self, config: Config, world: World, *parts: Any) -> None:
        super().__init__(config, world, *parts)
        self._rank = config.distributed.powersgd_rank
        generator = torch.Generator().manual_seed(config.seed)
        self._q: dict[nn.Parameter, torch.Tensor] = {}  # [rows, r], equal on all ranks
        self._rest: dict[nn.Parameter, torch.Tensor] = {}  # [rows, columns]: the remainder, between the passes M_i
        for parameter in self._parameters:
            if pays(parameter, self._rank):
                rows, columns = len(parameter), parameter.numel() // len(parameter)
                self._q[parameter] = torch.randn(rows, self._rank, generator=generator).to(world.device)
                self._rest[parameter] = torch.zeros(rows, columns, device=world.device)
        self._sent: list[tuple[list[nn.Parameter], torch.Tensor, dist.Work]] = []
        self._ddp.register_comm_hook(None, self._send)

    @property
    def label(self) -> str:
        return f"{self.name} of rank {self._rank}"

    @torch.no_grad()
    def _send(self, _: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        pieces = []
        for parameter, gradient in zip(bucket.parameters(), bucket.gradients(), strict=True):
            if parameter in self._q:
                matrix = self._rest[parameter]
                matrix.add_(gradient.movedim(1, -1).reshape_as(matrix))
                pieces.append((matrix.T @ self._q[parameter]).flatten())
            else:
                pieces.append(gradient.flatten())
        flat = torch.cat(pieces)
        self._sent.append((bucket.parameters(), flat, dist.all_reduce(flat, async_op=True)))
        device = self._world.device
        done = torch.futures.Future(devices=[device] if device.type == "cuda" else None)
        done.set_result(bucket.buffer())  # the gradients follow in after_backward
        return done

    @torch.no_grad()
    def after_backward(self) -> None:
        bases: dict[nn.Parameter, torch.Tensor] = {}
        for parameters, flat, work in self._sent:
            work.wait()
            flat /= self._world.size
            lengths = [self._rest[p].shape[1] * self._rank if p in self._q else p.numel() for p in parameters]
            for parameter, piece in zip(parameters, flat.split(lengths), strict=True):
                if parameter in self._q:  # the factorisation gives a basis for a matrix of zeros, too
                    bases[parameter] = torch.linalg.qr(piece.view(-1, self._rank)).Q
                else:
                    parameter.grad.copy_(piece.view_as(parameter))
        self._sent.clear()
        if not bases:
            return
        factors = [self._rest[parameter] @ basis for parameter, basis in bases.items()]
        flat = torch.cat([factor.flatten() for factor in factors])
        dist.all_reduce(flat)
        flat /= self._world.size
        lengths = [factor.numel() for factor in factors]
        for (parameter, basis), factor in zip(bases.items(), flat.split(lengths), strict=True):
            q = self._q[parameter].copy_(factor.view(-1, self._rank))
            mean = q @ basis.T
            self._rest[parameter].sub_(mean)
            parameter.grad.copy_(mean.view_as(parameter.grad.movedim(1, -1)).movedim(-1, 1))

    @torch.no_grad()
    def after_step(self, steps_in_epoch: int, epoch_ends: bool) -> None:
        if epoch_ends:
            self._average_weights()

    def _shared(self) -> list[torch.Tensor]:
        return list(self._q.values())

    def _own(self) -> list[torch.Tensor]:
        return list(self._rest.values())


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


KINDS = {kind.name: kind for kind in (AllReduce, BFloat16, PowerSGD, LocalSGD)}  # the most exact first


def pays(parameter: torch.Tensor, rank: int) -> bool:
    """Whether PowerSGD of this rank sends less than half of the parameter's gradient."""
    if parameter.ndim < 2:
        return False
    rows, columns = len(parameter), parameter.numel() // len(parameter)
    return 2 * rank * (rows + columns) < rows * columns


def _as_stored(tensor: torch.Tensor) -> torch.Tensor:
    """A dense tensor's values in the order in which memory holds them: a view, whatever the memory format."""
    return tensor.as_strided((tensor.numel(),), (1,))


def _collect(row: torch.Tensor, world: World) -> torch.Tensor:
    """Every rank's `row` on the ranks that keep checkpoints, [world size, n]; on the others it may be empty."""
    if world.own_folders:
        return gather(row, world)
    rows = [torch.empty_like(row) for _ in range(world.size)] if world.is_main else None
    dist.gather(row, rows, group=world.host_group)
    return torch.stack(rows) if rows else torch.empty(0)
