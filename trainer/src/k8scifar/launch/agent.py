"""Run torchrun in a child process and turn its failure report into one exit code.

Exit codes: 0 all local ranks ended well, 2 one of them met a user's mistake, 3 they stopped after saving, 4 one died of
a signal, 1 anything else. The ranks log their own errors; the agent logs a line only where a rank could not.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from k8scifar.console import say
from k8scifar.errors import CRASHED, FAILED, PREEMPTED, USER_MISTAKE, PeersDiffer
from k8scifar.launch import processes, rendezvous, reports
from k8scifar.launch.node import MIN_NODES

if TYPE_CHECKING:
    from torch.distributed import TCPStore

Report = reports.Writer[reports.AgentReport]


def main(arguments: list[str]) -> int:
    """Run torchrun with these arguments (see `torchrun --help`) in this process."""
    processes.die_with_parent(int(os.environ.get("K8SCIFAR_SUPERVISOR_PID", "0")))
    os.environ["K8SCIFAR_AGENT_PID"] = str(os.getpid())
    report = reports.Writer("agent.json", reports.AgentReport())
    threading.Thread(target=_show_life, args=(report,), daemon=True).start()

    # The agent's C++ messages repeat the ranks'; the ranks keep theirs.
    level = os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ["TORCH_CPP_LOG_LEVEL"] = "FATAL" if level == "ERROR" else level
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import static_tcp_rendezvous

    os.environ["TORCH_CPP_LOG_LEVEL"] = level
    if "LOGLEVEL" not in os.environ:
        logging.disable(logging.ERROR)  # torchrun would repeat the lines of the ranks and the supervisor
    parsed = torchrun.parse_args(arguments)
    try:
        if int(parsed.nnodes) == 1:
            static_tcp_rendezvous.TCPStore = _store_on_loopback
        elif MIN_NODES not in os.environ:
            meet(parsed, report)
        elif store := meet_elastic(parsed, report):
            static_tcp_rendezvous.TCPStore = lambda *_, **__: store
        torchrun.run(parsed)
    except ChildFailedError as failed:
        code, reason = verdict({rank: failure.exitcode for rank, failure in failed.failures.items()})
        if reason:
            say(f"k8scifar: {reason}")
            report.explain(reason)
        return code
    except SignalException:
        return PREEMPTED  # the supervisor, which sent the signal, reads the ranks' exit codes
    except Exception as error:  # the rendezvous's errors differ between torch releases
        if "LOGLEVEL" in os.environ:
            raise
        lines = str(error).strip().splitlines() or [type(error).__name__]
        say(f"k8scifar: torchrun: {lines[0][:300]}")
        return FAILED
    return 0


def _show_life(report: Report) -> None:
    """Count seconds in the report, so that the supervisor can tell a frozen agent from one that waits."""
    while True:
        report.update(beats=report.report.beats + 1)
        time.sleep(1.0)


def _store_on_loopback(address: str, port: int, *arguments: Any, **options: Any) -> TCPStore:
    """Open torch's store on the loopback interface only, where all ranks are on this machine."""
    from torch.distributed import TCPStore

    listener = socket.socket(socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((address, port))
    listener.listen()
    return TCPStore(address, port, *arguments, **options, master_listen_fd=listener.detach())


def meet(parsed: argparse.Namespace, report: Report) -> None:
    """Meet the other nodes of a fixed group; torchrun's own rendezvous follows."""
    address, port, store = parsed.master_addr, int(parsed.master_port), None
    job = f"--nnodes={parsed.nnodes} --nproc-per-node={parsed.nproc_per_node}"
    if parsed.node_rank:
        try:
            store = rendezvous.visit(address, port, parsed.node_rank, job, _longest_wait(parsed))
        except (TimeoutError, PeersDiffer) as error:
            say(f"k8scifar: error: {error}")
            rendezvous.end_agent(report, str(error))
    rendezvous.watch(address, port, job, report, store)


def meet_elastic(parsed: argparse.Namespace, report: Report) -> TCPStore | None:
    """Meet the other nodes of an elastic group, and have torchrun start with those that take part.

    Returns the store that node 0 has opened for torchrun; None on the others.
    """
    from k8scifar.launch.elastic import rollcall, waiting_room
    from k8scifar.launch.elastic.membership import Policy
    from k8scifar.results import participants

    address, port, node = parsed.master_addr, int(parsed.master_port), parsed.node_rank
    ranks, wait = int(parsed.nproc_per_node), _longest_wait(parsed)
    job = f"--nnodes={parsed.nnodes} --nproc-per-node={ranks} --min-nodes={os.environ[MIN_NODES]}"
    folder = Path(os.environ[reports.FOLDER])
    try:
        if node:
            group = waiting_room.join(address, port, node, job, report, wait)
        else:
            started = reports.Reports(folder, ranks)
            group = rollcall.call(address, port, job, Policy.read(folder), report, lambda: started.started, wait)
    except (TimeoutError, PeersDiffer) as error:
        say(f"k8scifar: error: {error}")
        rendezvous.end_agent(report, str(error))
    except RuntimeError:
        if not node:
            raise
        rendezvous.end_agent(report, "node 0 was lost, or has ended the attempt")
    if len(group.nodes) < int(parsed.nnodes):
        parsed.nnodes, parsed.node_rank = str(len(group.nodes)), group.nodes.index(node)
        parsed.training_script_args.append(f"--set=distributed.world_size={len(group.nodes) * ranks}")
        os.environ[participants.NODES] = ",".join(map(str, group.nodes))
    os.environ[participants.ATTEMPT] = group.attempt
    rendezvous.watch(address, port, job, report, group.store if node else None, group.each_time)
    return None if node else group.store


def _longest_wait(parsed: argparse.Namespace) -> float:
    """Seconds that the nodes wait for each other."""
    return float(dict(item.split("=") for item in parsed.rdzv_conf.split(","))["timeout"])


def verdict(exit_codes: Mapping[int, int]) -> tuple[int, str]:
    """Turn the failed ranks' exit codes into one exit code, and a reason where a rank could not report one."""
    codes = set(exit_codes.values())
    if USER_MISTAKE in codes:
        return USER_MISTAKE, ""
    # A rank that died counts before one that failed because of it. After a rank's own failure torchrun stops the others
    # with SIGTERM.
    stopped = {-signal.SIGTERM} if codes & {FAILED, CRASHED} else set()
    for rank, code in exit_codes.items():
        if code < 0 and code not in stopped:
            hint = ": if nobody killed it, the machine was out of memory" if code == -signal.SIGKILL else ""
            name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
            return CRASHED, f"rank {rank} died of {name}{hint}"
    if CRASHED in codes:
        return CRASHED, ""
    return (PREEMPTED if codes == {PREEMPTED} else FAILED), ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
