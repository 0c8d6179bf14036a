"""One node's part of the job: what to start, with which command and environment."""

from __future__ import annotations

import os
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from k8scifar import machine
from k8scifar.config.schema import Config
from k8scifar.launch.elastic import meeting
from k8scifar.results import lease

WORKER = "k8scifar.launch.worker"
HAS_SAFE_PATH = sys.version_info >= (3, 11)  # whether PYTHONSAFEPATH is heard
COMPILED = os.path.join(tempfile.gettempdir(), "k8scifar-inductor")  # kept from attempt to attempt


def run_module(name: str) -> list[str]:
    """The command that runs a module of the package; the working folder's own modules shadow nothing."""
    if HAS_SAFE_PATH:
        return [sys.executable, "-m", name]
    run = f"runpy.run_module('{name}', run_name='__main__', alter_sys=True)"
    return [sys.executable, "-u", "-c", f"import sys; sys.path.remove(''); import runpy; {run}"]


@dataclass
class NodeSpec:
    """What to start: one node's part of the job."""

    config: Config
    train_arguments: list[str]
    nnodes: int = 1
    nproc_per_node: int = 1
    node_rank: int = 0
    master_addr: str = "127.0.0.1"
    master_port: int | None = None
    """TCP port of the rendezvous; None: a free one."""
    restart: bool = False
    """Start again after a failure that a restart may mend."""
    when_done: str = "exit"
    """`exit`, `hold` or `scale-down`."""
    wait: float = 300.0
    """Seconds to wait for the master's name, for its port to be free, and for the other nodes."""
    pause: float = 1.0
    """Mean seconds between two attempts; the actual pause is between half and one and a half of it."""
    shutdown_timeout: int = 60
    """Seconds that the ranks get to save after SIGTERM."""
    data_wait: float = 1800.0
    """Seconds that a node other than 0 waits for the data set before it says so, and goes on waiting."""
    first_step: float = 900.0
    """Seconds that the ranks get for their first step, after which a missing heartbeat is theirs."""
    min_nodes: int = 0
    """The fewest nodes that go on without the others; 0 or `nnodes`: all have to be there."""
    elastic_wait: float = 120.0
    """Seconds that a node may be gone before the others go on without it."""
    elastic_grow: float = 60.0
    """Seconds, at least, that a node which is back waits outside before all meet anew with it."""
    environment: dict[str, str] = field(default_factory=lambda: dict(os.environ))

    @property
    def is_elastic(self) -> bool:
        """Whether the group may go on without a node that is gone for long."""
        return 0 < self.min_nodes < self.nnodes

    @property
    def waits_for_data(self) -> bool:
        """Whether another node prepares the data set that this one reads in a folder which both see."""
        return self.node_rank > 0 and self.restart and not self.own_folders

    @property
    def own_folders(self) -> bool:
        """Whether this node's folders are its own, and other nodes have others."""
        return self.nnodes > 1 and self.config.distributed.storage == "local"

    def command(self, port: int) -> list[str]:
        """torchrun with its arguments, meeting the other nodes by static rendezvous at this port."""
        return [
            *run_module("k8scifar.launch.agent"),
            f"--nnodes={self.nnodes}",
            f"--nproc-per-node={self.nproc_per_node}",
            f"--node-rank={self.node_rank}",
            f"--master-addr={self.master_addr}",
            f"--master-port={port}",
            f"--rdzv-conf=timeout={max(1, round(self.wait))}",
            "--max-restarts=0",
            *(("-m", WORKER) if HAS_SAFE_PATH else ("--no-python", *run_module(WORKER))),
            "train", *self.train_arguments,
        ]  # fmt: skip

    def child_environment(self, scratch: Path) -> dict[str, str]:
        """The environment of torchrun and its ranks; `scratch` is where they leave their exit codes and reasons."""
        threads = self.config.hardware.threads or max(1, machine.usable_cpus() // self.nproc_per_node)
        ours = {
            "OMP_NUM_THREADS": str(threads),
            "TMPDIR": str(scratch),  # what torch leaves behind in it goes with it
            "PYTHONSAFEPATH": "1",  # a random.py of the user's in this folder is no part of Python
            "PYTHONUNBUFFERED": "1",
            "K8SCIFAR_SCRATCH": str(scratch),
            "K8SCIFAR_REASON_FILE": str(scratch / "reason"),
            "K8SCIFAR_SUPERVISOR_PID": str(os.getpid()),
            lease.HOLDER: lease.holder(),
            "K8SCIFAR_PEER_TIMEOUT": str(self.config.distributed.timeout_seconds),
            # Read by torch 2.13 and newer in place of 30 s; the same as its --shutdown-timeout.
            "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(self.shutdown_timeout),
        }
        if self.is_elastic:
            ours[meeting.MIN_NODES] = str(self.min_nodes)
        if "TORCH_CPP_LOG_LEVEL" not in self.environment:
            ours["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # its warnings are of peers' names that have no reverse lookup
        if self.config.distributed.interface:
            ours |= dict.fromkeys(("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), self.config.distributed.interface)
        elif self.nnodes == 1 and "lo" in machine.interfaces():
            ours["GLOO_SOCKET_IFNAME"] = "lo"  # nobody outside has to reach these ranks
        if self.config.hardware.compile:
            ours.setdefault("TORCHINDUCTOR_CACHE_DIR", self.environment.get("TORCHINDUCTOR_CACHE_DIR", COMPILED))
        return self.environment | ours
