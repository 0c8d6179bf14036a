"""Three ranks of test_owners.py, forked: one import of torch. Argument: an empty folder."""

from __future__ import annotations

import multiprocessing
import sys
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # DDP would import it in each rank
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from k8scifar.config.schema import Config
from k8scifar.exchange.gradients import AllReduce, Int8
from k8scifar.ranks.heartbeats import Pulse
from k8scifar.ranks.world import World
from k8scifar.training.muon import Muon

RANKS = 3
SPEEDS, LATER = [1.0, 2.0, 1.0], [1.0, 1.0, 5.0]


def build() -> tuple[nn.Module, Muon]:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 3), nn.Conv2d(16, 4, 1), nn.Conv2d(4, 32, 3)]
    net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 4, 5)).to(memory_format=torch.channels_last)
    hidden = [net[1].weight, net[2].weight, net[3].weight]
    others = [parameter for parameter in net.parameters() if not any(parameter is weight for weight in hidden)]
    groups = [{"params": others}, {"params": hidden, "weight_decay": 0.0, "muon": True, "scale": 0.5}]
    return net, Muon(groups, 3, lr=0.05, momentum=0.9, nesterov=True, foreach=True)


def backward(net: nn.Module, rank: int, step: int) -> None:
    inputs = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(10 * step + rank))
    net(inputs.to(memory_format=torch.channels_last)).square().mean().backward()


def exact(world: World) -> None:
    """Against one process that adds all ranks' gradients up in their order and steps alone."""
    (net, optimizer), (alone, reference) = build(), build()
    ddp = DistributedDataParallel(net, gradient_as_bucket_view=True)
    exchange = AllReduce(Config(), world, ddp, optimizer)
    exchange.divide_updates(SPEEDS)
    for step in range(6):
        means = [torch.zeros_like(parameter) for parameter in alone.parameters()]
        for rank in range(RANKS):
            backward(alone, rank, step)
            for mean, parameter in zip(means, alone.parameters(), strict=True):
                mean.add_(parameter.grad * (1 / RANKS))
            alone.zero_grad()
        for mean, parameter in zip(means, alone.parameters(), strict=True):
            parameter.grad = mean
        reference.step()
        alone.zero_grad()
        backward(ddp, world.rank, step)
        exchange.after_backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        assert all(map(torch.equal, net.parameters(), alone.parameters())), f"rank {world.rank}, step {step}"
        if step == 2:
            before = [exchange.owner(parameter) for parameter in optimizer.hidden]
            exchange.divide_updates(LATER)
            assert before != [exchange.owner(parameter) for parameter in optimizer.hidden]
    exchange.snapshot()
    if world.is_main:
        for mine, its in zip(optimizer.hidden, reference.hidden, strict=True):
            momenta = optimizer.state[mine]["momentum_buffer"], reference.state[its]["momentum_buffer"]
            assert torch.equal(*momenta), "a checkpoint holds all of them"


def rounded(world: World) -> None:
    """Whatever was rounded off is still there: the sums of gradients and of directions are what they should be."""
    net, optimizer = build()
    ddp = DistributedDataParallel(net, gradient_as_bucket_view=True)
    exchange = Int8(Config(), world, ddp, optimizer)
    exchange.divide_updates(SPEEDS)
    wanted, taken, asked, made = ({weight: 0.0 for weight in optimizer.hidden} for _ in range(4))
    direction = optimizer.direction

    def watched(weight: torch.Tensor) -> torch.Tensor:
        taken[weight] += weight.grad.clone()
        found = direction(weight)
        asked[weight] += found
        return found

    optimizer.direction = watched
    for step in range(6):
        with ddp.no_sync():
            backward(ddp, world.rank, step)
        for weight in optimizer.hidden:
            wanted[weight] += weight.grad.clone()
        ddp.zero_grad(set_to_none=False)
        backward(ddp, world.rank, step)
        exchange.after_backward()
        optimizer.step()
        for weight in optimizer.hidden:
            made[weight] += weight.grad.movedim(1, -1).flatten(1)
        optimizer.zero_grad(set_to_none=False)
        if step == 2:
            exchange.divide_updates(LATER)
    saved = exchange.snapshot()
    flat = torch.cat([parameter.detach().flatten() for parameter in net.parameters()])
    everyone = [torch.empty_like(flat) for _ in range(RANKS)]
    dist.all_gather(everyone, flat)
    assert all(torch.equal(flat, other) for other in everyone), "replicas stay equal"
    for index, weight in enumerate(optimizer.hidden):
        left = exchange._own()[index].view_as(weight.movedim(1, -1)).movedim(-1, 1)
        mean = (wanted[weight] - left) / RANKS
        dist.all_reduce(mean)
        whole = taken[weight] + torch.zeros_like(weight)
        dist.all_reduce(whole)
        torch.testing.assert_close(whole, mean, rtol=1e-3, atol=1e-5)
        asked_for = asked[weight] + torch.zeros(len(weight), weight[0].numel())
        dist.all_reduce(asked_for)
        if world.is_main:
            rest = saved["shared"][index]
            assert rest.any()
            torch.testing.assert_close(made[weight] + rest, asked_for, rtol=1e-3, atol=1e-3)
    left = [tensor.clone() for tensor in exchange._own()]
    resumed(world, saved, left)


def resumed(world: World, saved: dict[str, Any], left: list[torch.Tensor]) -> None:
    """Another process has each rank's own remainders from a snapshot, and the owners' that all hold."""
    box = [saved]
    dist.broadcast_object_list(box, 0)  # as `find` gives every rank what rank 0 has read
    net, optimizer = build()
    exchange = Int8(Config(), world, DistributedDataParallel(net, gradient_as_bucket_view=True), optimizer)
    assert exchange.restore(box[0])
    assert all(map(torch.equal, exchange._own(), left)) and any(tensor.any() for tensor in left)
    assert all(map(torch.equal, exchange._shared(), box[0]["shared"]))


def rank(number: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), RANKS)
    dist.init_process_group("gloo", store=store, rank=number, world_size=RANKS)
    world = World(number, RANKS, 0, 1, torch.device("cpu"), "gloo", None, Pulse(0, 1), 60.0)
    exact(world)
    rounded(world)
    dist.barrier()


if __name__ == "__main__":
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=rank, args=(number, Path(sys.argv[1]))) for number in range(RANKS)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    sys.exit(any(process.exitcode for process in ranks))
