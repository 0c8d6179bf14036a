"""The command `k8scifar launch`: read and check its options, and run the supervisor."""

from __future__ import annotations

import argparse
import os
import re
import socket
from collections.abc import Callable, Mapping

from k8scifar import machine
from k8scifar.config import loading
from k8scifar.config.schema import Config
from k8scifar.console import say
from k8scifar.errors import UserError
from k8scifar.launch import sockets
from k8scifar.launch.elastic.membership import allowed
from k8scifar.launch.node import NodeSpec
from k8scifar.launch.supervisor import Supervisor

DEFAULT_PORT = 29500
ELASTIC_WAIT, ELASTIC_GROW = 120.0, 60.0  # seconds
CPU_PROCESSES = 2  # on one machine without GPUs: data-parallel training needs two


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    add = parser.add_argument_group("job").add_argument
    add("--nnodes", type=_count, default=1, metavar="N", help="machines that train together (1)")
    text = "processes on each machine (its GPUs; without GPUs 2 on one machine, 1 on several)"
    add("--nproc-per-node", type=_count, metavar="P", help=text)
    add("--node-rank", type=int, metavar="R", help="number of this machine, from 0 (in a pod: its index)")
    add("--master-addr", metavar="NAME", help="host name or address of machine 0")
    add("--master-port", type=int, metavar="PORT", help=f"TCP port of machine 0 ({DEFAULT_PORT})")
    text = "whether all machines share their folders or each has its own (distributed.storage)"
    add("--storage", choices=("shared", "local"), help=text)
    text = "start again after a failure (always with several machines)"
    add("--restart", choices=("always", "never"), help=text)
    add("--when-done", choices=("exit", "hold", "scale-down"), default="exit", help="what to do after training (exit)")
    _add_times(add)
    _add_elastic(add)
    parser.add_argument("--check", action="store_true", help="check the options and start nothing")
    loading.add_arguments(parser.add_argument_group("training"))


def _add_times(add: Callable[..., object]) -> None:
    text = "how long to wait for the other machines (300)"
    add("--wait", type=float, default=300.0, metavar="SECONDS", help=text)
    text = "how long a machine other than 0 waits for a shared data set before it reports an error (1800)"
    add("--data-wait", type=_count, default=1800, metavar="SECONDS", help=text)
    text = "how long the ranks may save after SIGTERM (60)"
    add("--shutdown-timeout", type=_count, default=60, metavar="SECONDS", help=text)
    text = "how long the first step may take, while the heartbeat is kept (900)"
    add("--first-step", type=_count, default=900, metavar="SECONDS", help=text)


def _add_elastic(add: Callable[..., object]) -> None:
    text = "train with N machines while others are away (all: wait for them)"
    add("--min-nodes", type=_count, metavar="N", help=text)
    text = f"how long a machine may be away before the others train without it ({ELASTIC_WAIT:.0f})"
    add("--elastic-wait", type=float, metavar="SECONDS", help=text)
    text = f"how long a returning machine waits, twice as long each time it has left again ({ELASTIC_GROW:.0f})"
    add("--elastic-grow", type=float, metavar="SECONDS", help=text)


def run(args: argparse.Namespace) -> int:
    """Supervise the training and return the process's exit code. Raises UserError before anything is started."""
    spec = node_spec(args, os.environ)
    return 0 if args.check else Supervisor(spec).run()


def node_spec(args: argparse.Namespace, environment: Mapping[str, str]) -> NodeSpec:
    """Return what to start, from the command line and the pod's environment. Raises UserError."""
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
    else:  # a variable that was left in a shell
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
            f"--min-nodes {spec.min_nodes}: of {spec.min_nodes} machines and more, only all {spec.nnodes} machines can "
            "share a global batch; lower it (1 always can), or lower micro_batch"
        )
    return spec


def _check_elastic(args: argparse.Namespace) -> None:
    """Raise UserError where the options of an elastic group contradict each other."""
    if (args.min_nodes or 1) > args.nnodes:
        raise UserError(f"--min-nodes {args.min_nodes} is more than --nnodes {args.nnodes}; lower it")
    if (args.min_nodes or args.nnodes) < args.nnodes and args.restart == "never":
        raise UserError(
            "--min-nodes needs --restart always, because the others restart without it; leave out one of them"
        )
    for option, seconds in (("--elastic-wait", args.elastic_wait), ("--elastic-grow", args.elastic_grow)):
        if seconds is None:
            continue
        if not seconds > 0:
            raise UserError(f"{option} {seconds:g} must be above 0 seconds")
        if not args.min_nodes:
            raise UserError(f"{option} needs --min-nodes: without it all machines wait for one that is away")


def _check_host_name(master: str) -> None:
    """Raise UserError where peers on other machines could not reach this one by its host name."""
    name = socket.gethostname()
    if sockets.leads_nowhere(name) and not sockets.leads_nowhere(master):
        raise UserError(
            f"the host name {name} resolves to the loopback address only, so that the peers can't connect back; set "
            f"distributed.interface (in the chart train.distributed.interface) to the one that reaches them, of "
            f"{', '.join(machine.interfaces())}"
        )


def processes(config: Config, nnodes: int, environment: Mapping[str, str]) -> int:
    """Return the default number of processes on this machine: its GPUs; without GPUs two on one machine, else one.

    On one machine there are no more than make the largest rank's number of micro-batches as small as possible.
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
        say(f"using {count} of {gpus} GPUs: a global batch is {micro_batches} micro-batches; lower micro_batch")
    return count


def train_arguments(args: argparse.Namespace) -> list[str]:
    """Return the options that are passed to `train` unchanged."""
    options = {
        "--recipe": args.recipe,
        "--config": args.config,
        "--data-dir": args.data_dir,
        "--runs-dir": args.runs_dir,
        "--name": args.name,
    }
    given = [f"{option}={value}" for option, value in options.items() if value is not None]
    return given + [f"--set={item}" for item in args.sets]


def node_rank(nnodes: int, environment: Mapping[str, str]) -> int:
    """Return this machine's number: a Job's completion index, else the end of the pod's name. Raises UserError."""
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
