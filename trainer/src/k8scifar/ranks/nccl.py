"""NCCL's settings: who notices a lost peer first, and what is kept of it.

The host-side agreements go over gloo, whose failure names the rank that is missing. NCCL's own watchdog ends the
process without such a line, so its time-out is longer, and that of the monitor of this watchdog longer still. What the
last collectives were is kept in a file of the run folder ("flight recorder").
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, MutableMapping
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
    seconds: float,
    run_dir: Path | None,
    environment: MutableMapping[str, str] = os.environ,
    version: str = torch.__version__,
) -> None:
    """Set what torch reads when the process group is made; what the user has set stays.

    Args:
        seconds: gloo's time-out.
        run_dir: where the recordings are kept, once it is known to be this run's (`make_folder`); None: torch's place.
    """
    monitor = max(MONITOR, seconds + 2 * margin(seconds))
    wanted = {
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": str(TEAR_DOWN),
        "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC": f"{monitor:.0f}",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
    }
    renamed = tuple(int(part) for part in version.split(".")[:2]) >= (2, 10)
    names = ("TORCH_FR_BUFFER_SIZE", "TORCH_FR_DUMP_TEMP_FILE")
    former = ("TORCH_NCCL_TRACE_BUFFER_SIZE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE")
    if run_dir and not any(name in environment for name in former):  # torch warns of the former names
        wanted |= dict(zip(names if renamed else former, (str(EVENTS), _recording(run_dir)), strict=True))
    for name, value in wanted.items():
        environment.setdefault(name, value)


def make_folder(run_dir: Path, environment: Mapping[str, str] = os.environ) -> None:
    """Make the folder of the recordings, if `settle_environment` has them kept in this run folder, which is ours."""
    if _recording(run_dir) in environment.values():
        with contextlib.suppress(OSError):  # then there is no recording; whoever needs the folder will tell
            (run_dir / FOLDER).mkdir(exist_ok=True)


def _recording(run_dir: Path) -> str:
    return str(run_dir / FOLDER / "rank_")
