"""What torchrun starts for each rank: `k8scifar train`, with its exit code left in a file for the supervisor.

torchrun itself keeps neither the exit codes of ranks that it stopped nor those after a SIGTERM.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from pathlib import Path

from k8scifar.errors import CRASHED, FAILED, LATE, PEER_LOST, PREEMPTED
from k8scifar.launch import processes


def main(arguments: list[str]) -> int:
    """Run the command line; leaves `started.RANK`, `exit.RANK` and, from the command, `reason.RANK` in the folder."""
    folder, rank = Path(os.environ["K8SCIFAR_SCRATCH"]), os.environ["RANK"]
    processes.die_with_parent(int(os.environ.get("K8SCIFAR_AGENT_PID", "0")))
    (folder / f"started.{rank}").touch()
    os.environ["K8SCIFAR_REASON_FILE"] = str(folder / f"reason.{rank}")
    code = CRASHED
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(PREEMPTED))  # until training has its own; nothing to save yet
    try:
        from k8scifar.cli import main as command

        code = command(arguments)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except Exception as error:
        traceback.print_exc()
        lines = str(error).strip().splitlines() or [""]
        (folder / f"reason.{rank}").write_text(f"rank {rank} failed: {type(error).__name__}: {lines[0]}"[:500])
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the end is settled; Python's own would show what comes now
        (folder / f"exit.{rank}").write_text(str(int(code or 0)))
    if code in (FAILED, CRASHED, PEER_LOST, LATE):  # torch's own end would wait for a peer that is lost
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return int(code or 0)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
