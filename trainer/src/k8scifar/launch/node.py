"""What to start on one node, with which command and environment."""

from __future__ import annotations

import os
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from k8scifar import machine
from k8scifar.config.schema import Config
from k8scifar.launch import reports
from k8scifar.results import lease, node_status

WORKER = "k8scifar.launch.worker"
MIN_NODES = "K8SCIFAR_MIN_NODES"  # environment variable of an elastic group's agent: how few nodes may train
HAS_SAFE_PATH = sys.version_info >= (3, 11)  # whether Python reads PYTHONSAFEPATH
COMPILED = os.path.join(tempfile.gettempdir(), "k8scifar-inductor")  # outlives an attempt


def run_module(name: str) -> list[str]:
    """Return the command that runs a module of the package, which no module of the working folder shadows."""
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
    """TCP port of the rendezvous; None: any free port."""
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
    """Seconds that a node other than 0 waits for the data set before it reports an error and waits again."""
    first_step: float = 900.0
    """Seconds that the ranks get for their first step, while the supervisor keeps the heartbeat."""
    min_nodes: int = 0
    """The fewest nodes that train without the others; 0 or `nnodes`: all nodes are needed."""
    elastic_wait: float = 120.0
    """Seconds that a node may be away before the others train without it."""
    elastic_grow: float = 60.0
    """Seconds, at least, that a returning node waits before it is taken back."""
    environment: dict[str, str] = field(default_factory=lambda: dict(os.environ))

    @property
    def is_elastic(self) -> bool:
        """Whether the group may train without a node that has been away for long."""
        return 0 < self.min_nodes < self.nnodes

    @property
    def waits_for_data(self) -> bool:
        """Whether another node prepares the data set that this one reads in a folder which both see."""
        return self.node_rank > 0 and self.restart and not self.own_folders

    @property
    def own_folders(self) -> bool:
        """Whether the nodes share no folder."""
        return self.nnodes > 1 and self.config.distributed.storage == "local"

    def command(self, port: int) -> list[str]:
        """Return torchrun's command, with static rendezvous at this port."""
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

    def child_environment(self, folder: Path) -> dict[str, str]:
        """Return the environment of torchrun and its ranks, which write their reports in `folder`."""
        threads = self.config.hardware.threads or max(1, machine.usable_cpus() // self.nproc_per_node)
        ours = {
            "OMP_NUM_THREADS": str(threads),
            "TMPDIR": str(folder),  # torch's temporary files are removed with it
            "PYTHONSAFEPATH": "1",  # no module of the working folder, such as random.py, shadows Python's
            "PYTHONUNBUFFERED": "1",
            reports.FOLDER: str(folder),
            "K8SCIFAR_SUPERVISOR_PID": str(os.getpid()),
            lease.HOLDER: lease.holder(),
            "K8SCIFAR_PEER_TIMEOUT": str(self.config.distributed.timeout_seconds),
            # torch 2.13 and newer read it, in place of 30 s; the same as the agent's --shutdown-timeout.
            "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(self.shutdown_timeout),
        }
        if self.is_elastic:
            ours[MIN_NODES] = str(self.min_nodes)
        if "TORCH_CPP_LOG_LEVEL" not in self.environment:
            ours["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # torch warns of peers' names that have no reverse lookup
        if self.config.distributed.interface:
            ours |= dict.fromkeys(("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), self.config.distributed.interface)
        elif self.nnodes == 1 and "lo" in machine.interfaces():
            ours["GLOO_SOCKET_IFNAME"] = "lo"  # no other machine has to reach these ranks
        if self.config.hardware.compile:
            ours.setdefault("TORCHINDUCTOR_CACHE_DIR", self.environment.get("TORCHINDUCTOR_CACHE_DIR", COMPILED))
        return self.environment | ours


def record_state(spec: NodeSpec, state: str, reason: str = "", attempt: int = 0) -> None:
    """Record the node's state for `k8scifar status`; without restarts, the terminal shows it."""
    if spec.restart:
        node_status.write(spec.config.run_dir, spec.node_rank, state, reason, attempt, spec.own_folders)
