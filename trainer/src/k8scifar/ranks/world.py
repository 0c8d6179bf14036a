"""Join the process group of all ranks.

torchrun's environment holds rank and world size; without it a process is the only rank. Collectives use NCCL on GPUs
and gloo on CPUs. Small host-side agreements always use gloo, so that they never wait for a GPU.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from k8scifar import machine
from k8scifar.config.schema import Config, check_world_size
from k8scifar.errors import PeerLost, UserError
from k8scifar.ranks import device as devices
from k8scifar.ranks import failures, nccl
from k8scifar.ranks.heartbeats import Heartbeats


@dataclass(frozen=True)
class World:
    """This process and its place among the ranks."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device
    backend: str
    host_group: Any  # gloo group for host-side agreements; None if the default group is gloo
    heartbeats: Heartbeats
    timeout: float  # seconds that a collective waits for a silent rank
    own_folders: bool = False  # whether each node has separate data and runs folders

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which logs and, if folders are shared, is the only rank that writes."""
        return self.rank == 0

    @property
    def keeps(self) -> bool:
        """Whether this rank writes a run folder: rank 0 and, if nodes have separate folders, the first of each node."""
        return keeps(self, self.rank)


@contextlib.contextmanager
def join(config: Config, run_dir: Path | None = None) -> Iterator[World]:
    """Join the process group that torchrun's environment describes; leave it at the end.

    A failed collective inside raises PeerLost with the rank that it waited for, if that can be found out.

    Args:
        run_dir: of the run that trains, for NCCL's recordings; nothing is written there yet.

    Raises:
        UserError: the environment is incomplete or wrong.
        PeerLost: a peer did not join in time, ended or fell silent.
        TrainingError: this machine's GPU or network failed.
    """
    rank, size = _integer("RANK", 0), _integer("WORLD_SIZE", 1)
    local_rank, local_size = _integer("LOCAL_RANK", 0), _integer("LOCAL_WORLD_SIZE", 1)
    device = devices.choose_device(config, local_rank)
    devices.prepare(config, device)
    torch.set_num_threads(config.hardware.threads or max(1, machine.usable_cpus() // local_size))
    if config.distributed.interface:
        os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = config.distributed.interface
    backend = config.distributed.backend
    if backend == "auto":
        backend = "nccl" if device.type == "cuda" else "gloo"
    seconds = config.distributed.timeout_seconds
    timeout, on_gpu = timedelta(seconds=seconds), {}
    if backend == "nccl":
        if size > 1:
            nccl.set_environment(seconds, run_dir)
        on_gpu = {"timeout": nccl.timeout(seconds), "device_id": device}
    alone = {"store": dist.HashStore(), "rank": 0, "world_size": 1} if "RANK" not in os.environ else {}
    try:
        dist.init_process_group(backend, **({"timeout": timeout} | on_gpu | alone))
    except (dist.DistError, RuntimeError, ValueError) as error:
        raise failures.failure(error, size) or PeerLost(
            f"rank {rank} of {size} could not join its peers: {failures.brief(error)}"
        ) from None
    heartbeats = Heartbeats(rank, size)
    try:
        group = dist.new_group(backend="gloo", timeout=timeout) if backend != "gloo" else None
        own_folders = config.distributed.storage == "local"
        yield World(rank, size, local_rank, local_size, device, backend, group, heartbeats, seconds, own_folders)
    except RuntimeError as error:
        # Destroying the process group would wait for the lost peer.
        if failures.is_peer_failure(error, size):
            raise PeerLost(f"rank {rank} gave up: {heartbeats.blame(error)}") from None
        if known := failures.failure(error, size):
            raise known from None
        raise
    except BaseException:
        _part()
        raise
    else:
        _part()
    finally:
        heartbeats.stop()


def keeps(world: World, rank: int) -> bool:
    """Whether this rank writes a run folder; torchrun numbers the ranks machine by machine, equally many on each."""
    return rank == 0 or (world.own_folders and rank % world.local_size == 0)


def _part() -> None:
    """Leave the process group."""
    # Its destructor holds the GIL while it waits for gloo's threads, which need the GIL to free their last tensors.
    time.sleep(0.1)
    dist.destroy_process_group()


def wait_for_gpu(world: World) -> None:
    """Wait until the GPU is idle, before a value is read from it; return at once on a CPU.

    Without this time-out, a reader would wait forever for a collective that a lost peer does not finish.
    Raises RuntimeError after the world's time-out.
    """
    if world.device.type != "cuda" or world.size == 1:
        return
    done, end = torch.cuda.Event(), time.monotonic() + world.timeout
    done.record()
    while not done.query():
        if time.monotonic() > end:
            raise RuntimeError(f"Timed out waiting {world.timeout:.0f} s for the GPU, which waits for the other ranks")
        time.sleep(0.0005)


def read(scalar: torch.Tensor, world: World) -> float:
    """Return a scalar's value; raises RuntimeError after the world's time-out."""
    wait_for_gpu(world)
    return scalar.item()


def check_size(config: Config) -> None:
    """Raise UserError unless the number of ranks is the configured one and they can share a global batch."""
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


def node_of_this_rank() -> int:
    """The number of this process's node, from 0, from torchrun's environment. Raises UserError."""
    return _integer("GROUP_RANK", 0)


def _integer(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdigit():
        raise UserError(f"environment variable {name} is {text!r}, not a number; start the ranks with torchrun")
    return int(text)
