"""NCCL's settings: who notices a lost peer first, and what is kept of it.

The host-side agreements go over gloo, whose failure names the rank that is missing. NCCL's own watchdog ends the
process without such a line, so its time-out is longer, and that of the monitor of this watchdog longer still. What the
last collectives were is kept in a file of the run folder ("flight recorder").
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import MutableMapping
from datetime import timedelta
from pathlib import Path

import torch

FOLDER = "nccl"  # of the run folder
MARGIN = 30.0  # seconds, at least, between two of the time-outs
MONITOR = 480.0  # seconds; torch's default, and the least here
EVENTS = 2000  # collectives that the flight recorder remembers
TEAR_DOWN = 3  # the watchdog ends the process: going on without a collective would train on garbage


def margin(seconds: float) -> float:
    """Seconds between gloo's time-out of so many seconds and NCCL's."""
    return max(MARGIN, seconds / 2)


def timeout(seconds: float) -> timedelta:
    """NCCL's time-out where gloo's is so many seconds."""
    return timedelta(seconds=seconds + margin(seconds))


def settle_environment(
    seconds: float, run_dir: Path, environment: MutableMapping[str, str] = os.environ, version: str = torch.__version__
) -> None:
    """Set what torch reads when the process group is made; what the user has set stays.

    Args:
        seconds: gloo's time-out.
    """
    folder = run_dir / FOLDER
    monitor = max(MONITOR, seconds + 2 * margin(seconds))
    wanted = {
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": str(TEAR_DOWN),
        "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC": f"{monitor:.0f}",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
    }
    renamed = tuple(int(part) for part in version.split(".")[:2]) >= (2, 10)
    names = ("TORCH_FR_BUFFER_SIZE", "TORCH_FR_DUMP_TEMP_FILE")
    former = ("TORCH_NCCL_TRACE_BUFFER_SIZE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE")
    if not any(name in environment for name in former):  # torch warns of the former names
        wanted |= dict(zip(names if renamed else former, (str(EVENTS), str(folder / "rank_")), strict=True))
        with contextlib.suppress(OSError):  # then there is no recording; whoever needs the folder will tell
            folder.mkdir(parents=True, exist_ok=True)
    for name, value in wanted.items():
        environment.setdefault(name, value)
