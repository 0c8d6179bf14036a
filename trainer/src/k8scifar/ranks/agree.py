"""Agreements between the ranks: equal facts, means, gathered values, work on some ranks, and flags."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any

import torch
import torch.distributed as dist

from k8scifar import liveness
from k8scifar.errors import PeersDiffer, Superseded, TrainingError, UserError
from k8scifar.ranks.world import World

LONGEST = 10  # time-outs for which the ranks wait for the work of one of them


def meet(world: World, facts: dict[str, Any]) -> None:
    """Raise PeersDiffer on every rank, with the differences, unless all ranks have equal `facts`; collective."""
    everyone = gather_json({"host": socket.gethostname(), "facts": facts}, world)
    first = everyone[0]
    for rank, other in enumerate(everyone):
        odd = [key for key in first["facts"] | other["facts"] if first["facts"].get(key) != other["facts"].get(key)]
        if odd:
            values = "; ".join(f"{key}: {first['facts'].get(key)} and {other['facts'].get(key)}" for key in odd)
            raise PeersDiffer(
                f"rank 0 ({first['host']}) and rank {rank} ({other['host']}) do not belong together: {values}; "
                "give all ranks the same configuration, data and version"
            )


@torch.no_grad()
def average(tensors: list[torch.Tensor], world: World, dtype: torch.dtype = torch.float64, weight: float = 1.0) -> None:
    """Replace each tensor by its mean over the ranks; in float64, equal values do not change. Collective.

    `weight`: of this rank's values; the mean of the ranks' weights must be 1.
    """
    flat = torch.cat([tensor.flatten().to(dtype) for tensor in tensors])
    flat *= weight
    world.heartbeats.arrive()
    dist.all_reduce(flat)
    flat /= world.size
    unflatten(flat, tensors)


@torch.no_grad()
def unflatten(flat: torch.Tensor, tensors: list[torch.Tensor]) -> None:
    """Copy the values of `flat` (1-dimensional) into the tensors, in order: the inverse of torch.cat."""
    for tensor, values in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(values.view_as(tensor))


def gather(row: torch.Tensor, world: World) -> torch.Tensor:
    """Return every rank's `row` (1-dimensional, equal length) on all ranks, on the CPU: [world size, n]; collective."""
    rows = [torch.empty_like(row, device="cpu") for _ in range(world.size)]
    world.heartbeats.arrive()
    dist.all_gather(rows, row.cpu(), group=world.host_group)
    return torch.stack(rows)


def gather_json(value: Any, world: World) -> list[Any]:
    """Return every rank's JSON value on all ranks; collective. No pickles, because received pickles can run code."""
    content = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    lengths = gather(torch.tensor([len(content)]), world)[:, 0].tolist()
    row = torch.zeros(max(lengths), dtype=torch.uint8)
    row[: len(content)] = content
    rows = gather(row, world)
    return [json.loads(bytes(row[:length].tolist())) for row, length in zip(rows, lengths, strict=True)]


def each(world: World, work: Callable[[], Any] | None) -> list[Any]:
    """Run `work` on each rank and return every rank's JSON result on all ranks (None without work); collective.

    A UserError or TrainingError of one rank is raised on every rank. The work may take up to LONGEST time-outs of a
    collective (slow storage): meanwhile the ranks exchange flags, four in a time-out.
    """
    job = _in_thread(work or (lambda: None))
    end = time.monotonic() + LONGEST * world.timeout
    while True:
        done = bool(wait([job], timeout=world.timeout / 4).done)
        flags = gather(torch.tensor([done, time.monotonic() > end]), world)
        liveness.touch()
        if flags[:, 0].all():
            break
        if flags[:, 1].any():
            slow = (~flags[:, 0]).nonzero()[0].item()
            raise TrainingError(f"rank {slow} is not done after {LONGEST * world.timeout:.0f} s: does a volume hang?")
    answers = gather_json(job.result() | {"host": socket.gethostname()}, world)
    for rank, answer in enumerate(answers):
        for kind in (UserError, TrainingError):
            if text := answer.get(kind.__name__):
                raise kind(f"on {answer['host']}: {text}" if rank and answer["host"] != socket.gethostname() else text)
    return [answer["value"] for answer in answers]


def _in_thread(work: Callable[[], Any]) -> Future[dict[str, Any]]:
    """Start `work` in a thread, which may hang in the kernel forever; the result is JSON for all ranks."""
    job: Future[dict[str, Any]] = Future()

    def run() -> None:
        try:
            job.set_result({"value": work()})
        except Superseded as error:  # only this process must end
            job.set_exception(error)
        except (UserError, TrainingError) as error:
            kind = UserError if isinstance(error, UserError) else TrainingError
            job.set_result({kind.__name__: str(error)})
        except BaseException as error:
            job.set_exception(error)

    threading.Thread(target=run, name="work", daemon=True).start()
    return job


def broadcast(content: bytes, source: int, world: World) -> bytes:
    """Return rank `source`'s `content` on every rank; collective."""
    length = torch.tensor([len(content)])
    world.heartbeats.arrive()
    dist.broadcast(length, source, group=world.host_group)
    buffer = torch.empty(int(length.item()), dtype=torch.uint8)
    if world.rank == source:
        buffer = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    world.heartbeats.arrive()
    dist.broadcast(buffer, source, group=world.host_group)
    return buffer.numpy().tobytes()


class Agreement:
    """Flags for a step: a flag that any rank raises is raised on all ranks.

    `begin` starts the exchange before the step's computation and `end` reads it afterwards, so the step does not wait.
    """

    def __init__(self, world: World, names: tuple[str, ...]) -> None:
        self._world, self._names = world, names
        self._flags = torch.zeros(len(names), dtype=torch.int32)
        self._work: Any = None

    def begin(self, **raised: bool) -> None:
        """Start sending this rank's flags."""
        self._flags = torch.tensor([int(raised.get(name, False)) for name in self._names], dtype=torch.int32)
        self._work = dist.all_reduce(self._flags, dist.ReduceOp.MAX, group=self._world.host_group, async_op=True)

    def end(self) -> set[str]:
        """Return the names of the flags that any rank raised; collective."""
        self._world.heartbeats.arrive()
        self._work.wait()
        return {name for name, flag in zip(self._names, self._flags.tolist(), strict=True) if flag}

    def now(self, **raised: bool) -> set[str]:
        """`begin` and `end` in one call; collective."""
        self.begin(**raised)
        return self.end()
