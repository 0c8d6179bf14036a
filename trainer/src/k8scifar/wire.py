"""Which way of communicating fits: the wire and the step are timed when the ranks meet, once in a run.

The choice is part of the mathematics, so it is kept: a run that resumes at the same world size goes on in the mode
that its checkpoint names, however fast the wire is by then.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import astuple, dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from k8scifar.config import Config
from k8scifar.parallel import World

GOOD = 0.95  # of the step's time is computation: the first mode that promises it is taken, the most exact first
HIDDEN = 0.5  # of forward and backward can hide the gradients' way: what is ready first is most of it
EXPOSED = 0.1  # of the way cannot be hidden: the last bucket is ready when the backward pass is over
PATIENCE = 1.0  # seconds; an all-reduce of the gradients that takes longer is not repeated


@dataclass(frozen=True)
class Times:
    """Seconds, of the slowest rank."""

    gradients: float  # an all-reduce of all gradients, float32
    latency: float  # an all-reduce of one number
    compute: float  # forward and backward of a step
    memory: float  # adding one buffer of the gradients' size to another


def choose(
    config: Config, world: World, kept: str | None, net: nn.Module, measure: Callable[[], Times]
) -> tuple[str, str]:
    """The mode and why, the same on all ranks; collective.

    Args:
        kept: the mode of the checkpoint that is resumed, if that is of this world size.
        measure: called where neither the configuration nor the checkpoint nor the ranks' places decide.
    """
    wanted = config.distributed.comm
    if wanted != "auto":
        return wanted, "as distributed.comm says"
    if world.size == 1:
        return "allreduce", "one rank"
    if kept:
        return kept, "kept from the checkpoint, not measured again"
    if world.local_size == world.size:
        return "allreduce", "all ranks are on one machine"
    times = measure()
    steps = predict(times, config)
    mode = torch.tensor([list(steps).index(best(times, steps))])
    dist.broadcast(mode, 0, group=world.host_group)
    megabytes = 4e-6 * sum(parameter.numel() for parameter in net.parameters())
    told = ", ".join(f"{name} {seconds:.2f}" for name, seconds in steps.items())
    why = (
        f"an all-reduce of the gradients ({megabytes:.1f} MB) takes {times.gradients:.2f} s, of one number "
        f"{1000 * times.latency:.1f} ms, forward and backward {times.compute:.2f} s; predicted seconds a step: {told}"
    )
    return list(steps)[mode.item()], why


def predict(times: Times, config: Config) -> dict[str, float]:
    """Seconds a step in each mode, the optimiser left out; not in powersgd, which costs accuracy: a user's choice."""
    wire = max(times.gradients - times.latency, 0.0)

    def step(way: float, work: float = 0.0) -> float:
        return times.compute + work + max(EXPOSED * way, way - HIDDEN * times.compute)

    return {
        "allreduce": step(wire + times.latency),
        "bf16": step(wire / 2 + times.latency, 2 * times.memory),
        "local-sgd": times.compute + (times.gradients + 2 * times.memory) / config.distributed.local_sgd_steps,
    }


def best(times: Times, steps: dict[str, float]) -> str:
    """The most exact mode that wastes little, or else the fastest."""
    for name, seconds in steps.items():
        if times.compute >= GOOD * seconds:
            return name
    return min(steps, key=steps.__getitem__)


def measure(
    net: nn.Module, inputs: torch.Tensor, labels: torch.Tensor, micro_batches: int, precision: str, world: World
) -> Times:
    """Time the wire and a step of `micro_batches` batches like this one; collective. Changes nothing of `net`."""
    buffers = [(buffer, buffer.clone()) for buffer in net.buffers()]

    def step() -> None:
        with torch.autocast(world.device.type, torch.bfloat16, enabled=precision == "bf16"):
            logits = net(inputs)
        F.cross_entropy(logits.float(), labels).backward()

    step()  # the first is slower
    compute = micro_batches * _seconds(step, world)
    with torch.no_grad():
        for buffer, value in buffers:
            buffer.copy_(value)
    for parameter in net.parameters():
        if parameter.grad is not None:
            parameter.grad.zero_()
    flat = torch.zeros(sum(parameter.numel() for parameter in net.parameters()), device=world.device)
    one = torch.zeros(1, device=world.device)
    other = torch.zeros_like(flat)
    memory = min(_seconds(lambda: flat.add_(other), world) for _ in range(3))
    latency = min(_seconds(lambda: dist.all_reduce(one), world) for _ in range(10))
    gradients = _slowest(_seconds(lambda: dist.all_reduce(flat), world), world)
    if gradients < PATIENCE:
        gradients = min(gradients, *(_seconds(lambda: dist.all_reduce(flat), world) for _ in range(3)))
    mine = Times(gradients, latency, compute, memory)
    return Times(*(_slowest(value, world) for value in astuple(mine)))


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
