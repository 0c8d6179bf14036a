"""torchrun as a child of the supervisor: the same program, but its end is an exit code and not a table.

Exit codes: 0 all local ranks ended well, 2 one of them met a user's mistake, 3 they stopped after saving, 4 one died of
a signal, 1 anything else. The ranks print what went wrong themselves; this adds a line only where they could not.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

from k8scifar.errors import CRASHED, FAILED, PREEMPTED, USER_MISTAKE, PeersDiffer
from k8scifar.launch import processes
from k8scifar.launch.elastic import meeting


def main(arguments: list[str]) -> int:
    """Run torchrun with these arguments (see `torchrun --help`) in this process."""
    processes.die_with_parent(int(os.environ.get("K8SCIFAR_SUPERVISOR_PID", "0")))
    os.environ["K8SCIFAR_AGENT_PID"] = str(os.getpid())
    threading.Thread(target=_show_life, daemon=True).start()

    # The agent's C++ messages repeat what the ranks' say; the ranks themselves keep theirs.
    level = os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ["TORCH_CPP_LOG_LEVEL"] = "FATAL" if level == "ERROR" else level
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import static_tcp_rendezvous

    os.environ["TORCH_CPP_LOG_LEVEL"] = level
    if "LOGLEVEL" not in os.environ:
        logging.disable(logging.ERROR)  # the ranks' own lines and the supervisor's say what torchrun would repeat
    parsed = torchrun.parse_args(arguments)
    try:
        if int(parsed.nnodes) > 1 and meeting.MIN_NODES in os.environ:
            if store := _call_the_roll(parsed):
                static_tcp_rendezvous.TCPStore = lambda *_, **__: store
        elif int(parsed.nnodes) > 1:
            _meet(parsed)
        else:
            static_tcp_rendezvous.TCPStore = _store_on_loopback
        torchrun.run(parsed)
    except ChildFailedError as failed:
        return _code(failed)
    except SignalException:
        return PREEMPTED  # the supervisor, which sent the signal, reads the ranks' own codes
    except Exception as error:  # the rendezvous's own errors differ between releases
        if "LOGLEVEL" in os.environ:
            raise
        print(f"k8scifar: torchrun: {_first_line(error)}", file=sys.stderr, flush=True)
        return FAILED
    return 0


def _store_on_loopback(address: str, port: int, *arguments: Any, **options: Any) -> Any:
    """torch's store, where all ranks are on this machine: it listens there alone, and on no other interface."""
    from torch.distributed import TCPStore

    listener = socket.socket(socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((address, port))
    listener.listen()
    return TCPStore(address, port, *arguments, **options, master_listen_fd=listener.detach())


def _show_life() -> None:
    """Touch a file for the supervisor, so that it can tell a frozen torchrun from one that waits."""
    alive = Path(os.environ.get("K8SCIFAR_SCRATCH", "/nowhere"), "alive")
    while alive.parent.is_dir():
        with contextlib.suppress(OSError):
            alive.touch()
        time.sleep(1.0)


def _meet(parsed: argparse.Namespace) -> None:
    address, port, store = parsed.master_addr, int(parsed.master_port), None
    job = f"--nnodes={parsed.nnodes} --nproc-per-node={parsed.nproc_per_node}"
    if parsed.node_rank:
        try:
            store = meeting.knock(address, port, parsed.node_rank, job, _patience(parsed))
        except (TimeoutError, PeersDiffer) as error:
            print(f"k8scifar: error: {error}", file=sys.stderr)
            meeting.leave(str(error))
    meeting.watch(address, port, job, store)


def _call_the_roll(parsed: argparse.Namespace) -> Any:
    """Settle with the other nodes of an elastic group who takes part, and have torchrun start with those.

    Returns the store that node 0 has opened for it; None on the others.
    """
    from k8scifar.launch.elastic import rollcall
    from k8scifar.launch.elastic.attendance import Orders
    from k8scifar.launch.scratch import Scratch
    from k8scifar.results import participants

    address, port, node = parsed.master_addr, int(parsed.master_port), parsed.node_rank
    ranks = int(parsed.nproc_per_node)
    job = f"--nnodes={parsed.nnodes} --nproc-per-node={ranks} --min-nodes={os.environ[meeting.MIN_NODES]}"
    scratch = Scratch(Path(os.environ["K8SCIFAR_SCRATCH"]), ranks)
    try:
        if node:
            party = rollcall.answer(address, port, node, job, scratch, _patience(parsed))
        else:
            party = rollcall.call(address, port, job, Orders.read(scratch.path), scratch, _patience(parsed))
    except (TimeoutError, PeersDiffer) as error:
        print(f"k8scifar: error: {error}", file=sys.stderr)
        meeting.leave(str(error))
    except RuntimeError:
        if not node:
            raise
        meeting.leave("node 0 was lost, or lets all nodes meet anew")
    if len(party.nodes) < int(parsed.nnodes):
        parsed.nnodes, parsed.node_rank = str(len(party.nodes)), party.nodes.index(node)
        parsed.training_script_args.append(f"--set=distributed.world_size={len(party.nodes) * ranks}")
        os.environ[participants.NODES] = ",".join(map(str, party.nodes))
    os.environ[participants.ATTEMPT] = party.attempt
    meeting.watch(address, port, job, party.store if node else None, party.look)
    return None if node else party.store


def _patience(parsed: argparse.Namespace) -> float:
    """Seconds that the nodes wait for each other."""
    return float(dict(item.split("=") for item in parsed.rdzv_conf.split(","))["timeout"])


def _code(failed) -> int:
    # Of the ranks that ended by themselves, one that died comes before one that only noticed it. A SIGTERM beside a
    # rank's own failure is torchrun's, which stops the rest.
    codes = {failure.exitcode for failure in failed.failures.values()}
    if USER_MISTAKE in codes:
        return USER_MISTAKE
    stopped = {-signal.SIGTERM} if codes & {FAILED, CRASHED} else set()
    died = [(rank, failure) for rank, failure in failed.failures.items() if failure.exitcode < 0]
    died = [(rank, failure) for rank, failure in died if failure.exitcode not in stopped]
    if died:
        rank, failure = died[0]
        number = -failure.exitcode
        hint = ": if nobody killed it, the machine was out of memory" if number == signal.SIGKILL else ""
        name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
        reason = f"rank {rank} died of {name}{hint}"
        print(f"k8scifar: {reason}", file=sys.stderr, flush=True)
        meeting.leave_reason(reason)
        return CRASHED
    if CRASHED in codes:
        return CRASHED
    return PREEMPTED if codes == {PREEMPTED} else FAILED


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:300]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
