"""Timed trials of a step, on which the cost model relies; they leave the model's weights and statistics unchanged."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from k8scifar.config.schema import Config
from k8scifar.exchange import modes
from k8scifar.exchange.cost_model import Speeds, Times
from k8scifar.exchange.interface import DividesUpdates, Exchange
from k8scifar.exchange.shares import Shares, equal
from k8scifar.ranks.agree import gather
from k8scifar.ranks.device import autocast
from k8scifar.ranks.world import World

LONG_TRIAL = 1.0  # seconds; a trial that the wire makes longer than this is not repeated


@dataclass(frozen=True)
class Trial:
    """Passes of micro-batches to be timed."""

    ddp: DistributedDataParallel
    optimizer: torch.optim.Optimizer
    batch: Callable[[int], tuple[torch.Tensor, torch.Tensor]]  # inputs and labels of so many micro-batches
    passes: Callable[[int], list[int]]  # the passes in which training computes so many micro-batches
    following: Callable[[int], contextlib.AbstractContextManager[None]]  # surrounds the forward pass of so many
    precision: str
    world: World
    config: Config

    @property
    def together(self) -> int:
        """Micro-batches of a pass when all ranks have equal shares."""
        return self.passes(equal(self.config.micro_batches, self.world.size)[0])[0]

    def step(self, net: nn.Module, together: int) -> None:
        """Forward and backward of one pass."""
        inputs, labels = self.batch(together)
        with self.following(together), autocast(self.world.device, self.precision):
            logits = net(inputs)
        F.cross_entropy(logits.float(), labels).backward()

    @contextlib.contextmanager
    def undone(self) -> Iterator[None]:
        """Restore the running statistics at the end, and set the gradients to zero."""
        buffers = [(buffer, buffer.clone()) for buffer in self.ddp.buffers()]
        yield
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        self.ddp.zero_grad(set_to_none=False)


def measure_speeds(trial: Trial, pixels: int) -> Speeds:
    """Time each rank's own work (c, u, p), all ranks at once as in training, without an exchange; collective."""
    world, updates, together = trial.world, 0.0, trial.together
    with trial.undone():
        trial.step(trial.ddp.module, together)  # the first is slower
        seconds = min(_seconds(lambda: trial.step(trial.ddp.module, together), world) for _ in range(2)) / together
    if isinstance(trial.optimizer, DividesUpdates):
        updates = min(_seconds(trial.optimizer.rehearse, world) for _ in range(2))
    plain = _plain_step(trial)
    rest = min(_seconds(plain, world) for _ in range(2))
    everyone = gather(torch.tensor([seconds, updates, rest], dtype=torch.float64), world)
    own, directions, steps = everyone.T.tolist()
    return Speeds(own, directions, pixels, steps)


def _plain_step(trial: Trial) -> Callable[[], Any]:
    """A step of SGD on a copy of the weights; every rank takes one, whatever its share."""
    copies = [weight.detach().clone() for weight in trial.ddp.parameters()]
    for weight in copies:
        weight.grad = torch.zeros_like(weight)
    step = torch.optim.SGD(copies, lr=0.1, momentum=0.9, nesterov=True, foreach=True).step
    step()  # the first one creates the momenta
    return step


def measure_modes(trial: Trial, speeds: Speeds, counts: list[int]) -> Times:
    """Time the exchange of each mode during a step (x, a); collective.

    Args:
        speeds: as `measure_speeds` returned them.
        counts: the ranks' micro-batches in the division to be expected.
    """
    ddp, world, compute = trial.ddp, trial.world, max(speeds.micro_batch)
    together = trial.together
    exposed, one_pass = {}, together * compute
    with trial.undone():
        for mode in modes_to_try(trial.precision):
            exchange = modes.build(mode, 1, world, ddp, trial.optimizer)

            def step(exchange: Exchange = exchange) -> None:
                trial.step(exchange.model, together)
                exchange.after_backward(rehearsal=True)

            exposed[mode] = max(_repeated(step, world, one_pass) - one_pass, 0.0)
    flat = torch.zeros(sum(parameter.numel() for parameter in ddp.parameters()), device=world.device)

    def movement() -> None:
        small = flat.bfloat16()
        dist.all_reduce(small)
        flat.copy_(small)

    return Times(
        _repeated(movement, world),
        sum(counts) / len(counts) * compute,
        exposed,
        max(speeds.updates),
        max(count * each for count, each in zip(counts, speeds.micro_batch, strict=True)),
    )


def measure_step(trial: Trial, mode: str, shares: Shares) -> float:
    """Seconds of a whole step in this mode with these shares on the slowest rank; collective."""
    ddp, world = trial.ddp, trial.world
    exchange = modes.build(mode, 1, world, ddp, trial.optimizer)
    exchange.divide_updates(shares.relative)
    *first, last = trial.passes(shares.counts[world.rank])
    plain = _plain_step(trial)

    def step() -> None:
        with ddp.no_sync():
            for together in first:
                trial.step(exchange.model, together)
        trial.step(exchange.model, last)
        exchange.after_backward(rehearsal=True)
        plain()

    with trial.undone():
        step()  # the first is slower
        return _repeated(step, world)


def modes_to_try(precision: str) -> list[str]:
    """The modes that `auto` times, the most exact first; an overflow in fp16 would corrupt int8's remainders."""
    return [mode for mode in modes.GRADIENTS if mode != "int8" or precision != "fp16"]


def _repeated(work: Callable[[], Any], world: World, known: float = 0.0) -> float:
    """Seconds on the slowest rank: the least of three trials, or the first if it takes LONG_TRIAL more than `known`."""
    first = _slowest(work, world)
    return first if first > LONG_TRIAL + known else min(first, _slowest(work, world), _slowest(work, world))


def _slowest(work: Callable[[], Any], world: World) -> float:
    """Seconds on the slowest rank; collective."""
    value = torch.tensor([_seconds(work, world)], dtype=torch.float64)
    dist.all_reduce(value, dist.ReduceOp.MAX, group=world.host_group)
    return value.item()


def _seconds(work: Callable[[], Any], world: World) -> float:
    synchronize = torch.cuda.synchronize if world.device.type == "cuda" else lambda: None
    synchronize()
    begun = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - begun
