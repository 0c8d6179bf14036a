"""How the ranks agree: they compare what they hold, rank 0 decides for all, means are taken, flags are raised."""

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

from k8scifar import heartbeat
from k8scifar.errors import PeersDiffer, Superseded, TrainingError, UserError
from k8scifar.ranks.world import World

PATIENCE = 10  # time-outs that the ranks wait for what rank 0 alone does, as long as it says that it is at it
BUSY, NOTHING = -2, -1  # lengths that announce no content


def meet(world: World, facts: dict[str, Any]) -> None:
    """Raise PeersDiffer on every rank, saying what differs, unless all ranks hold equal `facts`."""
    everyone = gather_json({"host": socket.gethostname(), "facts": facts}, world)
    first = everyone[0]
    for rank, other in enumerate(everyone):
        odd = [key for key in first["facts"] | other["facts"] if first["facts"].get(key) != other["facts"].get(key)]
        if odd:
            told = "; ".join(f"{key}: {first['facts'].get(key)} and {other['facts'].get(key)}" for key in odd)
            raise PeersDiffer(
                f"rank 0 ({first['host']}) and rank {rank} ({other['host']}) do not belong together: {told}; "
                "give all ranks the same configuration, data and version"
            )


@torch.no_grad()
def average(tensors: list[torch.Tensor], world: World, dtype: torch.dtype = torch.float64) -> None:
    """Replace each tensor by its mean over the ranks; in float64 values that are equal stay what they are."""
    flat = torch.cat([tensor.flatten().to(dtype) for tensor in tensors])
    world.pulse.arrive()
    dist.all_reduce(flat)
    flat /= world.size
    unflatten(flat, tensors)


@torch.no_grad()
def unflatten(flat: torch.Tensor, tensors: list[torch.Tensor]) -> None:
    """Copy the values of `flat` (1-dimensional) into the tensors, in order: what torch.cat of them had joined."""
    for tensor, values in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(values.view_as(tensor))


def gather(row: torch.Tensor, world: World) -> torch.Tensor:
    """Every rank's `row` (1-dimensional, equal length), stacked on the CPU: [world size, n]; the same on all ranks."""
    rows = [torch.empty_like(row, device="cpu") for _ in range(world.size)]
    world.pulse.arrive()
    dist.all_gather(rows, row.cpu(), group=world.host_group)
    return torch.stack(rows)


def gather_json(value: Any, world: World) -> list[Any]:
    """Every rank's JSON value, on all ranks; collective. No pickles: what crosses the network can't run code."""
    content = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    lengths = gather(torch.tensor([len(content)]), world)[:, 0].tolist()
    row = torch.zeros(max(lengths), dtype=torch.uint8)
    row[: len(content)] = content
    rows = gather(row, world)
    return [json.loads(bytes(row[:length].tolist())) for row, length in zip(rows, lengths, strict=True)]


def from_rank_0(world: World, decide: Callable[[], bytes | None]) -> bytes | None:
    """What `decide` returns on rank 0, on every rank; its UserError or TrainingError is raised on every rank alike.

    It may take longer than a collective's time-out (slow storage): rank 0 tells the others that it is still at it, up
    to PATIENCE time-outs.
    """
    if not world.is_main:
        while (length := _announced(world)) == BUSY:
            heartbeat.touch()
        content = _content(length, None, world)
    else:
        work = _in_thread(decide)
        end = time.monotonic() + PATIENCE * world.timeout
        while not wait([work], timeout=world.timeout / 4).done:
            if time.monotonic() > end:
                raise TrainingError(f"rank 0 is not done after {PATIENCE * world.timeout:.0f} s: does a volume hang?")
            heartbeat.touch()
            _announced(world, BUSY)
        answer = work.result()
        content = _content(_announced(world, NOTHING if answer is None else len(answer)), answer, world)
    if content is None or content[:1] == b"+":
        return content and content[1:]
    raise (UserError if content[:1] == b"-" else TrainingError)(content[1:].decode())


def _in_thread(decide: Callable[[], bytes | None]) -> Future[bytes | None]:
    """The bytes that tell all ranks what `decide` came to; in a thread that may hang in the kernel for good."""
    work: Future[bytes | None] = Future()

    def run() -> None:
        try:
            content = decide()
            work.set_result(None if content is None else b"+" + content)
        except Superseded as error:  # this process's own mistake: the others must not end for it
            work.set_exception(error)
        except UserError as error:
            work.set_result(b"-" + str(error).encode())
        except TrainingError as error:
            work.set_result(b"!" + str(error).encode())
        except BaseException as error:
            work.set_exception(error)

    threading.Thread(target=run, name="rank-0", daemon=True).start()
    return work


def _announced(world: World, length: int = 0) -> int:
    """Rank 0's `length` on every rank."""
    number = torch.tensor([length])
    world.pulse.arrive()
    dist.broadcast(number, 0, group=world.host_group)
    return int(number.item())


def _content(length: int, content: bytes | None, world: World) -> bytes | None:
    """Rank 0's `content`, of the announced length, on every rank."""
    if length < 0:
        return None
    buffer = torch.empty(length, dtype=torch.uint8)
    if content is not None:
        buffer = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    dist.broadcast(buffer, 0, group=world.host_group)
    return buffer.numpy().tobytes()


class Agreement:
    """A few flags that all ranks see alike at the end of a step: raised by any rank, raised on all.

    The exchange starts before the step's computation and is read after it, so it costs a step nothing.
    """

    def __init__(self, world: World, names: tuple[str, ...]) -> None:
        self._world, self._names = world, names
        self._flags = torch.zeros(len(names), dtype=torch.int32)
        self._work: Any = None

    def begin(self, **raised: bool) -> None:
        """Send this rank's flags."""
        self._flags = torch.tensor([int(raised.get(name, False)) for name in self._names], dtype=torch.int32)
        self._work = dist.all_reduce(self._flags, dist.ReduceOp.MAX, group=self._world.host_group, async_op=True)

    def end(self) -> set[str]:
        """The names of the flags that any rank raised."""
        self._world.pulse.arrive()
        self._work.wait()
        return {name for name, flag in zip(self._names, self._flags.tolist(), strict=True) if flag}

    def now(self, **raised: bool) -> set[str]:
        """`begin` and `end` in one."""
        self.begin(**raised)
        return self.end()
