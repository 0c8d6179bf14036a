"""What torchrun starts for each rank: `k8scifar train`, which reports its exit code and reason to the supervisor.

torchrun drops the exit codes of ranks that it stopped, and of all ranks after a SIGTERM.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback

from k8scifar.errors import CRASHED, FAILED, LATE, PEER_LOST, PREEMPTED
from k8scifar.launch import processes
from k8scifar.launch.reports import RankReport, Writer


def main(arguments: list[str]) -> int:
    """Run the command line in this process; its report exists from the start and holds the exit code at the end."""
    rank = os.environ["RANK"]
    processes.die_with_parent(int(os.environ.get("K8SCIFAR_AGENT_PID", "0")))
    report = Writer(f"rank-{rank}.json", RankReport())
    report.update()
    code = CRASHED
    # Training installs another handler; before that there is nothing to save.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(PREEMPTED))
    try:
        from k8scifar.cli import main as command

        code = command(arguments, report.explain)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except Exception as error:
        traceback.print_exc()
        lines = str(error).strip().splitlines() or [""]
        report.explain(f"rank {rank} failed: {type(error).__name__}: {lines[0]}"[:500])
    finally:
        # The exit code is known; a signal that comes now would only print a traceback.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        report.update(exit_code=code)
    if code in (FAILED, CRASHED, PEER_LOST, LATE):  # torch's shutdown would wait for a lost peer
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
