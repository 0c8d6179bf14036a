"""Run this node's part of the training: torchrun under a supervisor that outlives a peer's faults."""

from __future__ import annotations

import argparse
import os
import re
import socket
from collections.abc import Mapping

from k8scifar import machine
from k8scifar.config import loading
from k8scifar.config.schema import Config
from k8scifar.console import say
from k8scifar.errors import UserError
from k8scifar.launch import sockets
from k8scifar.launch.elastic.attendance import allowed
from k8scifar.launch.node import NodeSpec
from k8scifar.launch.supervisor import Supervisor

DEFAULT_PORT = 29500
ELASTIC_WAIT, ELASTIC_GROW = 120.0, 60.0  # seconds
CPU_PROCESSES = 2  # on one machine: what this project is about


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    job = parser.add_argument_group("job")
    job.add_argument("--nnodes", type=_count, default=1, metavar="N", help="machines that train together (1)")
    job.add_argument(
        "--nproc-per-node",
        type=_count,
        metavar="P",
        help="processes on each machine (its GPUs; else 2 on one, 1 on several)",
    )
    job.add_argument("--node-rank", type=int, metavar="R", help="which machine this is, from 0 (in a pod: its index)")
    job.add_argument("--master-addr", metavar="NAME", help="host name or address of machine 0")
    job.add_argument(
        "--storage",
        choices=("shared", "local"),
        help="whether all machines see the same folders, or each has its own (distributed.storage)",
    )
    job.add_argument("--master-port", type=int, metavar="PORT", help=f"TCP port of machine 0 ({DEFAULT_PORT})")
    job.add_argument(
        "--restart", choices=("always", "never"), help="start again after a failure (always with several machines)"
    )
    job.add_argument(
        "--when-done", choices=("exit", "hold", "scale-down"), default="exit", help="what to do after training (exit)"
    )
    job.add_argument(
        "--wait", type=float, default=300.0, metavar="SECONDS", help="how long to wait for the other machines (300)"
    )
    job.add_argument(
        "--min-nodes", type=_count, metavar="N", help="go on with N machines while others are gone (all: wait for them)"
    )
    job.add_argument(
        "--elastic-wait",
        type=float,
        metavar="SECONDS",
        help=f"how long a machine may be gone before the others go on without it ({ELASTIC_WAIT:.0f})",
    )
    job.add_argument(
        "--elastic-grow",
        type=float,
        metavar="SECONDS",
        help="how long a machine that is back waits before it takes part, longer each time it has left again "
        f"({ELASTIC_GROW:.0f})",
    )
    job.add_argument(
        "--data-wait",
        type=_count,
        default=1800,
        metavar="SECONDS",
        help="how long a machine other than 0 waits for a shared folder's data set before it says so (1800)",
    )
    job.add_argument(
        "--shutdown-timeout", type=_count, default=60, metavar="SECONDS", help="time to save after SIGTERM (60)"
    )
    job.add_argument(
        "--first-step",
        type=_count,
        default=900,
        metavar="SECONDS",
        help="time for the first step, heartbeat kept (900)",
    )
    parser.add_argument("--check", action="store_true", help="look for mistakes in the options, and start nothing")
    loading.add_arguments(parser.add_argument_group("training"))


def run(args: argparse.Namespace) -> int:
    """Supervise the training; returns the process's exit code. Raises UserError before anything is started."""
    spec = node_spec(args, os.environ)
    return 0 if args.check else Supervisor(spec).run()


def node_spec(args: argparse.Namespace, environment: os._Environ[str] | dict[str, str]) -> NodeSpec:
    """What to start, from the command line and the pod's environment. Raises UserError."""
    rank = args.node_rank if args.node_rank is not None else node_rank(args.nnodes, environment)
    if not 0 <= rank < args.nnodes:
        raise UserError(f"--node-rank {rank} must be from 0 to {args.nnodes - 1} with --nnodes {args.nnodes}")
    if args.nnodes > 1 and not args.master_addr:
        raise UserError(f"--nnodes {args.nnodes} needs --master-addr: the host name or address of machine 0")
    if args.master_port is not None and not 0 < args.master_port < 65536:
        raise UserError(f"--master-port {args.master_port} must be from 1 to 65535")
    if not args.wait > 0:
        raise UserError(f"--wait {args.wait:g} must be above 0 seconds")
    if args.storage:
        args.sets = [*args.sets, f"distributed.storage={args.storage}"]
    _check_elastic(args)
    config = loading.from_arguments(args)
    if config.distributed.interface:
        machine.check_interface(config.distributed.interface, "distributed.interface")
    else:  # libraries' variables, left in a shell
        machine.check_interface(environment.get("GLOO_SOCKET_IFNAME", ""), "GLOO_SOCKET_IFNAME")
        if args.nnodes > 1 and not environment.get("GLOO_SOCKET_IFNAME"):
            _check_host_name(args.master_addr)
    nproc = args.nproc_per_node or processes(config, args.nnodes, environment)
    size, wanted = args.nnodes * nproc, config.distributed.world_size
    if wanted not in (None, size):
        raise UserError(
            f"distributed.world_size is {wanted}, but --nnodes {args.nnodes} with --nproc-per-node {nproc} starts "
            f"{size} ranks; leave it out, or change one of them"
        )
    args.sets = [*args.sets, f"distributed.world_size={size}"]
    spec = NodeSpec(
        config=loading.from_arguments(args),
        train_arguments=train_arguments(args),
        nnodes=args.nnodes,
        nproc_per_node=nproc,
        node_rank=rank,
        master_addr=args.master_addr or "127.0.0.1",
        master_port=args.master_port or (DEFAULT_PORT if args.nnodes > 1 else None),
        restart=(args.restart or ("always" if args.nnodes > 1 else "never")) == "always",
        when_done=args.when_done,
        wait=args.wait,
        shutdown_timeout=args.shutdown_timeout,
        first_step=args.first_step,
        data_wait=args.data_wait,
        min_nodes=args.min_nodes or args.nnodes,
        elastic_wait=args.elastic_wait or ELASTIC_WAIT,
        elastic_grow=args.elastic_grow or ELASTIC_GROW,
        environment=dict(environment),
    )
    if spec.is_elastic and allowed(spec) == [spec.nnodes]:
        raise UserError(
            f"--min-nodes {spec.min_nodes}: from that number up, only all {spec.nnodes} machines can share a global "
            "batch; lower it (1 always can), or lower micro_batch"
        )
    return spec


def _check_elastic(args: argparse.Namespace) -> None:
    """Raise UserError where the options of an elastic group make no sense."""
    if (args.min_nodes or 1) > args.nnodes:
        raise UserError(f"--min-nodes {args.min_nodes} is more than --nnodes {args.nnodes}; lower it")
    if (args.min_nodes or args.nnodes) < args.nnodes and args.restart == "never":
        raise UserError("--min-nodes needs --restart always: who goes on alone starts again; leave out one of them")
    for option, seconds in (("--elastic-wait", args.elastic_wait), ("--elastic-grow", args.elastic_grow)):
        if seconds is None:
            continue
        if not seconds > 0:
            raise UserError(f"{option} {seconds:g} must be above 0 seconds")
        if not args.min_nodes:
            raise UserError(f"{option} needs --min-nodes: without it all machines wait for one that is gone")


def _check_host_name(master: str) -> None:
    """Raise UserError where this host's name would lead its peers nowhere, and they are on other machines."""
    name = socket.gethostname()
    if sockets.leads_nowhere(name) and not sockets.leads_nowhere(master):
        raise UserError(
            f"the host name {name} resolves to the loopback address only, so that the peers can't connect back; set "
            f"distributed.interface (in the chart train.distributed.interface) to the one that reaches them, of "
            f"{', '.join(machine.interfaces())}"
        )


def processes(config: Config, nnodes: int, environment: Mapping[str, str]) -> int:
    """Processes on this machine where nobody says how many: its GPUs; without, two alone, else one.

    On one machine that is for us to choose: no more than it takes for the largest share to be as small as it can be.
    """
    gpus = machine.usable_gpus(environment) if config.hardware.device != "cpu" else 0
    if nnodes > 1:
        return gpus or 1
    wanted, micro_batches = gpus or CPU_PROCESSES, config.micro_batches
    if config.distributed.comm == "local-sgd":
        count = next(count for count in range(wanted, 0, -1) if micro_batches % count == 0)
    else:
        largest = -(-micro_batches // wanted)
        count = -(-micro_batches // largest)
    if count < gpus:
        say(f"{count} of {gpus} GPUs are used: a global batch is {micro_batches} micro-batches; lower micro_batch")
    return count


def train_arguments(args: argparse.Namespace) -> list[str]:
    """The options that `train` takes over unchanged."""
    options = {
        "--recipe": args.recipe,
        "--config": args.config,
        "--data-dir": args.data_dir,
        "--runs-dir": args.runs_dir,
        "--name": args.name,
    }
    given = [f"{option}={value}" for option, value in options.items() if value is not None]
    return given + [f"--set={item}" for item in args.sets]


def node_rank(nnodes: int, environment: os._Environ[str] | dict[str, str]) -> int:
    """This machine's rank: a Job's completion index, else the number that ends the pod's name. Raises UserError."""
    if nnodes == 1:
        return 0
    if index := environment.get("JOB_COMPLETION_INDEX", ""):
        if not index.isdigit():
            raise UserError(f"JOB_COMPLETION_INDEX is {index!r}, not a number; give --node-rank")
        return int(index)
    name = environment.get("POD_NAME") or environment.get("HOSTNAME") or socket.gethostname()
    if not (ordinal := re.search(r"-(\d+)$", name)):
        raise UserError(f"the host name {name!r} does not end in a number; give --node-rank, 0 to {nnodes - 1}")
    return int(ordinal[1])


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number, 1 or more")
    return int(text)
