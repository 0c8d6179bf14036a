"""PowerSGD: gradients as products of low rank."""

# No `from __future__ import annotations`: DistributedDataParallel reads a hook's annotations, not their text.
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from k8scifar.config.schema import Config
from k8scifar.ranks.exchange import AllReduce
from k8scifar.ranks.world import World


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


def pays(parameter: torch.Tensor, rank: int) -> bool:
    """Whether PowerSGD of this rank sends less than half of the parameter's gradient."""
    if parameter.ndim < 2:
        return False
    rows, columns = len(parameter), parameter.numel() // len(parameter)
    return 2 * rank * (rows + columns) < rows * columns
