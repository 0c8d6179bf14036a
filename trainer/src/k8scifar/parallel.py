"""Ranks: how they join, check that they belong together, and agree.

torchrun's environment says who is who; without it a process is a world of one. Collectives are NCCL on GPUs and gloo
on CPUs; small host-side agreements always go over gloo, so that they never wait for a GPU.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from k8scifar import processes
from k8scifar.completion import touch_heartbeat
from k8scifar.config import Config, check_world_size
from k8scifar.errors import PeersDiffer, RankError, TrainingError, UserError
from k8scifar.pulse import Pulse, first_line

PATIENCE = 10  # time-outs that the ranks wait for what rank 0 alone does, as long as it says that it is at it
PEER_FAILURES = ("gloo", "nccl", "connection", "timed out", "timeout", "pair closure", "socket", "broken pipe")
BUSY, NOTHING = -2, -1  # lengths that announce no content


@dataclass(frozen=True)
class World:
    """This process among its peers."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device
    backend: str
    host_group: Any  # gloo group for host-side agreements; None: the default group is gloo
    pulse: Pulse
    timeout: float  # seconds that a collective waits for a silent rank

    @property
    def leads(self) -> bool:
        """Whether this is rank 0, which alone writes."""
        return self.rank == 0


@contextlib.contextmanager
def join(config: Config) -> Iterator[World]:
    """Join the process group that torchrun's environment describes; leave it at the end.

    Raises UserError where the environment makes no sense, TrainingError where peers do not come in time, and in place
    of any failure of a collective, naming the rank that it waited for as far as can be told.
    """
    rank, size = _integer("RANK", 0), _integer("WORLD_SIZE", 1)
    local_rank, local_size = _integer("LOCAL_RANK", 0), _integer("LOCAL_WORLD_SIZE", 1)
    device = _device(config, local_rank)
    torch.set_num_threads(config.hardware.threads or max(1, processes.usable_cpus() // local_size))
    if config.distributed.interface:
        os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = config.distributed.interface
    backend = config.distributed.backend
    if backend == "auto":
        backend = "nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=config.distributed.timeout_seconds)
    alone = {"store": dist.HashStore(), "rank": 0, "world_size": 1} if "RANK" not in os.environ else {}
    try:
        dist.init_process_group(backend, timeout=timeout, **alone)
    except (dist.DistError, RuntimeError, ValueError) as error:
        raise TrainingError(f"rank {rank} of {size} could not join its peers: {first_line(error)}") from None
    pulse = Pulse(rank, size)
    try:
        group = dist.new_group(backend="gloo", timeout=timeout) if backend != "gloo" else None
        yield World(rank, size, local_rank, local_size, device, backend, group, pulse, timeout.total_seconds())
    except RuntimeError as error:
        if not is_peer_failure(error):
            raise
        # The process group is left as it is: taking it down would wait for the peer that is lost.
        raise TrainingError(f"rank {rank} gave up: {pulse.blame(error)}") from None
    except BaseException:
        _part()
        raise
    else:
        _part()
    finally:
        pulse.stop()


def _part() -> None:
    """Leave the process group. Its destructor holds the GIL and waits for a gloo thread that may want it."""
    time.sleep(0.1)  # so the threads of gloo get it first, to let go of their last collective's tensors
    dist.destroy_process_group()


def check_size(config: Config) -> None:
    """Raise UserError unless there are as many ranks as the configuration says, and they can share a global batch."""
    size, wanted = _integer("WORLD_SIZE", 1), config.distributed.world_size
    if wanted and wanted != size:
        raise UserError(
            f"WORLD_SIZE is {size}, but distributed.world_size is {wanted}; start {wanted} ranks "
            f"(torchrun --nnodes and --nproc-per-node), or set distributed.world_size={size}"
        )
    try:
        check_world_size(config, size)
    except ValueError as error:
        raise UserError(f"configuration: {error}") from None


def meet(world: World, facts: dict[str, Any]) -> None:
    """Raise PeersDiffer on every rank, saying what differs, unless all ranks hold equal `facts`."""
    mine = {"host": socket.gethostname(), "facts": facts}
    everyone: list[Any] = [None] * world.size
    dist.all_gather_object(everyone, mine, group=world.host_group)
    first = everyone[0]
    for rank, other in enumerate(everyone):
        odd = [key for key in first["facts"] | other["facts"] if first["facts"].get(key) != other["facts"].get(key)]
        if odd:
            told = "; ".join(f"{key}: {first['facts'].get(key)} and {other['facts'].get(key)}" for key in odd)
            raise PeersDiffer(
                f"rank 0 ({first['host']}) and rank {rank} ({other['host']}) do not belong together: {told}; "
                "give all ranks the same configuration, data and version"
            )


def resolve_precision(config: Config, world: World) -> str:
    """`bf16` or `fp32`; `auto` is bf16 where every rank has it in hardware."""
    if config.hardware.precision != "auto":
        return config.hardware.precision
    able = torch.tensor([int(_has_bf16(world.device))])
    dist.all_reduce(able, dist.ReduceOp.MIN, group=world.host_group)
    return "bf16" if able.item() else "fp32"


@torch.no_grad()
def average(tensors: list[torch.Tensor], world: World, dtype: torch.dtype = torch.float64) -> None:
    """Replace each tensor by its mean over the ranks; in float64 values that are equal stay what they are."""
    flat = torch.cat([tensor.flatten().to(dtype) for tensor in tensors])
    world.pulse.arrive()
    dist.all_reduce(flat)
    flat /= world.size
    spread(flat, tensors)


@torch.no_grad()
def spread(flat: torch.Tensor, tensors: list[torch.Tensor]) -> None:
    """Copy the values of `flat` (1-dimensional) into the tensors, in order: what torch.cat of them had joined."""
    for tensor, values in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(values.view_as(tensor))


def gather(row: torch.Tensor, world: World) -> torch.Tensor:
    """Every rank's `row` (1-dimensional, equal length), stacked on the CPU: [world size, n]; the same on all ranks."""
    rows = [torch.empty_like(row, device="cpu") for _ in range(world.size)]
    world.pulse.arrive()
    dist.all_gather(rows, row.cpu(), group=world.host_group)
    return torch.stack(rows)


def lead(world: World, decide: Callable[[], bytes | None]) -> bytes | None:
    """What `decide` returns on rank 0, on every rank; its UserError or TrainingError is raised on every rank alike.

    It may take longer than a collective's time-out (slow storage): rank 0 tells the others that it is still at it, up
    to PATIENCE time-outs.
    """
    if not world.leads:
        while (length := _announced(world)) == BUSY:
            touch_heartbeat()
        content = _content(length, None, world)
    else:
        work = _in_thread(decide)
        end = time.monotonic() + PATIENCE * world.timeout
        while not wait([work], timeout=world.timeout / 4).done:
            if time.monotonic() > end:
                raise TrainingError(f"rank 0 is not done after {PATIENCE * world.timeout:.0f} s: does a volume hang?")
            touch_heartbeat()
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
        except UserError as error:
            work.set_result(b"-" + str(error).encode())
        except TrainingError as error:
            work.set_result(b"!" + str(error).encode())
        except BaseException as error:
            work.set_exception(error)

    threading.Thread(target=run, name="lead", daemon=True).start()
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


def is_peer_failure(error: BaseException) -> bool:
    """Whether an error means that a collective could not be finished: a peer died, fell silent or was cut off."""
    text = str(error).lower()
    return isinstance(error, dist.DistError) or any(word in text for word in PEER_FAILURES)


def _integer(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdigit():
        raise UserError(f"environment variable {name} is {text!r}, not a number; start the ranks with torchrun")
    return int(text)


def _device(config: Config, local_rank: int) -> torch.device:
    if config.hardware.device == "cpu" or (config.hardware.device == "auto" and not torch.cuda.is_available()):
        if config.distributed.backend == "nccl":
            raise UserError("distributed.backend=nccl needs GPUs, and this rank trains on the CPU; set it to auto")
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("hardware.device=cuda, but torch sees no GPU here; set hardware.device=cpu, or mend the driver")
    if local_rank >= torch.cuda.device_count():
        raise RankError(
            f"local rank {local_rank} has no GPU: this machine has {torch.cuda.device_count()}; "
            "lower --nproc-per-node, or set hardware.device=cpu"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def _has_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)  # Ampere; older ones only emulate it
    with contextlib.suppress(OSError):
        flags = Path("/proc/cpuinfo").read_text()
        return "avx512_bf16" in flags or "amx_bf16" in flags
    return False
