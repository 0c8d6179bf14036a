"""Which way of communicating fits: the wire and the step are timed when the ranks meet, once in a run.

The choice is part of the mathematics, so it is kept: a run that resumes at the same world size goes on in the mode
that its checkpoint names, however fast the wire is by then.
"""

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
from k8scifar.exchange.gradients import AllReduce, SharesWork
from k8scifar.exchange.modes import KINDS
from k8scifar.exchange.shares import Shares, Speeds, equal
from k8scifar.ranks.agree import gather
from k8scifar.ranks.device import autocast
from k8scifar.ranks.world import World

GOOD = 0.95  # of the fastest choice's speed is enough: the most exact choice that promises it is taken
PERIODS = (0.5, 0.75, 1)  # times distributed.local_sgd_steps between two averagings
COST = "in a run of 200 steps, averaging every 8 of them cost one to two points of accuracy, every 4 less than one"
PATIENCE = 1.0  # seconds; a trial of the wire that takes longer is not repeated


@dataclass(frozen=True)
class Choice:
    """A mode of modes.KINDS, and the steps between two averagings of local SGD."""

    mode: str
    every: int

    def __str__(self) -> str:
        return f"{self.mode} every {self.every} steps" if self.mode == "local-sgd" else self.mode


@dataclass(frozen=True)
class Times:
    """Seconds, of the slowest rank."""

    movement: float  # an all-reduce of as many numbers as there are weights, bfloat16, rounding and return included
    compute: float  # forward and backward of a step with equal shares, nothing sent
    exposed: dict[str, float]  # by mode: what exchanging the gradients and dividing Muon's directions add to that
    updates: float = 0.0  # Muon's directions of all weights, on one rank
    divided: float | None = None  # as `compute`, the shares as the ranks' speeds would have them; None: equal


def choose(
    config: Config, world: World, kept: dict[str, Any] | None, parameters: int, measure: Callable[[], Times]
) -> tuple[Choice, str]:
    """How to communicate and why, the same on all ranks; collective.

    Args:
        kept: what the checkpoint that is resumed says of it, if that is of this world size.
        measure: called where neither the configuration nor the checkpoint nor the ranks' places decide.
    """
    wanted, every = config.distributed.comm, config.distributed.local_sgd_steps
    if wanted != "auto":
        return Choice(wanted, every), "as distributed.comm says"
    if world.size == 1:
        return Choice("allreduce", every), "one rank"
    if kept and kept["mode"] in KINDS:
        return Choice(kept["mode"], kept.get("every", every)), "kept from the checkpoint, not measured again"
    if world.local_size == world.size:
        return Choice("allreduce", every), "all ranks are on one machine"
    times = measure()
    steps = predict(times, every)
    if config.micro_batches % world.size:  # local SGD needs equal shares
        steps = {choice: seconds for choice, seconds in steps.items() if choice.mode != "local-sgd"}
    index = torch.tensor([list(steps).index(best(steps))])
    dist.broadcast(index, 0, group=world.host_group)
    told = ", ".join(f"{choice} {seconds:.3f}" for choice, seconds in steps.items())
    told_updates = f", Muon's directions {times.updates:.2f} s" if times.updates else ""
    why = (
        f"an all-reduce in bfloat16 ({2e-6 * parameters:.1f} MB) takes {times.movement:.2f} s, forward and backward "
        f"{times.compute:.2f} s{told_updates}; predicted seconds a step: {told}"
    )
    chosen = list(steps)[index.item()]
    return chosen, f"{why}; {COST}" if chosen.mode == "local-sgd" else why


def predict(times: Times, every: int) -> dict[Choice, float]:
    """Seconds a step of each choice, SGD left out.

    `every`: most steps between two averagings of local SGD.
    """
    compute = times.compute if times.divided is None else times.divided
    seconds = {Choice(mode, every): compute + extra for mode, extra in times.exposed.items()}
    for period in (max(1, round(part * every)) for part in PERIODS):  # in int8: half of what `movement` timed
        # Here each rank has all of Muon's directions, and an equal share.
        seconds[Choice("local-sgd", period)] = times.compute + times.updates + times.movement / 2 / period
    return seconds


def best(steps: dict[Choice, float]) -> Choice:
    """The most exact choice that is nearly as fast as the fastest."""
    fastest = min(steps.values())
    return next(choice for choice, seconds in steps.items() if fastest >= GOOD * seconds)


@dataclass(frozen=True)
class Trial:
    """Passes of micro-batches to be timed; whatever is tried, the model stays as it is."""

    ddp: DistributedDataParallel
    optimizer: torch.optim.Optimizer
    batch: Callable[[int], tuple[torch.Tensor, torch.Tensor]]  # so many micro-batches' inputs and labels
    passes: Callable[[int], list[int]]  # so many micro-batches as training computes them: those of each pass
    following: Callable[[int], contextlib.AbstractContextManager[None]]  # is put around the forward pass of so many
    precision: str
    world: World
    config: Config

    @property
    def together(self) -> int:
        """Micro-batches of a pass, where all ranks have equal shares."""
        return self.passes(equal(self.config.micro_batches, self.world.size)[0])[0]

    def step(self, net: nn.Module, together: int) -> None:
        """Forward and backward of one pass."""
        inputs, labels = self.batch(together)
        with self.following(together), autocast(self.world.device, self.precision):
            logits = net(inputs)
        F.cross_entropy(logits.float(), labels).backward()

    @contextlib.contextmanager
    def undone(self) -> Iterator[None]:
        """Put back what steps within it change: running statistics and gradients."""
        buffers = [(buffer, buffer.clone()) for buffer in self.ddp.buffers()]
        yield
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        self.ddp.zero_grad(set_to_none=False)


def alone(trial: Trial, pixels: int) -> Speeds:
    """Time each rank's own step, all ranks at once as in training, nothing sent; collective."""
    world, updates, together = trial.world, 0.0, trial.together
    with trial.undone():
        trial.step(trial.ddp.module, together)  # the first is slower
        seconds = min(_seconds(lambda: trial.step(trial.ddp.module, together), world) for _ in range(2)) / together
    if isinstance(trial.optimizer, SharesWork):
        updates = min(_seconds(trial.optimizer.rehearse, world) for _ in range(2))
    plain = _plain_step(trial)
    rest = min(_seconds(plain, world) for _ in range(2))
    everyone = gather(torch.tensor([seconds, updates, rest], dtype=torch.float64), world)
    own, directions, steps = everyone.T.tolist()
    return Speeds(own, directions, pixels, steps)


def _plain_step(trial: Trial) -> Callable[[], Any]:
    """A step of SGD of a copy of the weights, as each rank takes it whatever its share."""
    copies = [weight.detach().clone() for weight in trial.ddp.parameters()]
    for weight in copies:
        weight.grad = torch.zeros_like(weight)
    step = torch.optim.SGD(copies, lr=0.1, momentum=0.9, nesterov=True, foreach=True).step
    step()  # the first one makes the momenta
    return step


def measure(trial: Trial, speeds: Speeds, counts: list[int]) -> Times:
    """Time the wire beside a step; collective.

    Args:
        speeds: as `alone` found them.
        counts: the ranks' micro-batches, in the division that there would be.
    """
    ddp, world, compute = trial.ddp, trial.world, max(speeds.micro_batch)
    together = trial.together
    exposed, one_pass = {}, together * compute
    with trial.undone():
        for mode in tried(trial.precision):
            exchange = KINDS[mode](trial.config, world, ddp, trial.optimizer)

            def step(exchange: AllReduce = exchange) -> None:
                trial.step(exchange.model, together)
                exchange.rehearse()

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


def timed(trial: Trial, mode: str, divided: Shares) -> float:
    """Seconds of a whole step in this mode with these shares, the slowest rank's; collective."""
    ddp, world = trial.ddp, trial.world
    exchange = KINDS[mode](trial.config, world, ddp, trial.optimizer)
    exchange.divide_updates(divided.relative)
    *first, last = trial.passes(divided.counts[world.rank])
    plain = _plain_step(trial)

    def step() -> None:
        with ddp.no_sync():
            for together in first:
                trial.step(exchange.model, together)
        trial.step(exchange.model, last)
        exchange.rehearse()
        plain()

    with trial.undone():
        step()  # the first is slower
        return _repeated(step, world)


def tried(precision: str) -> list[str]:
    """The modes that `auto` times, the most exact first; in fp16 an overflow would spoil what int8 carries along."""
    return ["allreduce", "bf16", *["int8"] * (precision != "fp16")]


def _repeated(work: Callable[[], Any], world: World, known: float = 0.0) -> float:
    """Seconds of the slowest rank; the least of three trials unless the first takes PATIENCE more than `known`."""
    first = _slowest(_seconds(work, world), world)
    if first > PATIENCE + known:
        return first
    return min(first, *(_slowest(_seconds(work, world), world) for _ in range(2)))


def _seconds(work: Callable[[], Any], world: World) -> float:
    _settle(world)
    begun = time.perf_counter()
    work()
    _settle(world)
    return time.perf_counter() - begun


def _settle(world: World) -> None:
    if world.device.type == "cuda":
        torch.cuda.synchronize()


def _slowest(seconds: float, world: World) -> float:
    value = torch.tensor([seconds], dtype=torch.float64)
    dist.all_reduce(value, dist.ReduceOp.MAX, group=world.host_group)
    return value.item()
