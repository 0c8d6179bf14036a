"""NCCL's time-outs and its flight recorder.

gloo, which the host-side agreements use, must detect a lost peer first: its failure identifies the missing rank, while
NCCL's watchdog ends the process without doing so. So NCCL's time-out is longer, and that of the watchdog's monitor
longer still. The flight recorder writes the last collectives to a file in the run folder.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, MutableMapping
from datetime import timedelta
from pathlib import Path

import torch

FOLDER = "nccl"  # of the run folder
LEAST_MARGIN = 30.0  # seconds between two of the time-outs
MONITOR = 480.0  # seconds: torch's default, and the minimum here
EVENTS = 2000  # collectives that the flight recorder keeps
TEAR_DOWN = 3  # the watchdog ends the process, because a step without its collective would train on garbage


def margin(seconds: float) -> float:
    """Seconds between gloo's time-out of `seconds` and NCCL's."""
    return max(LEAST_MARGIN, seconds / 2)


def timeout(seconds: float) -> timedelta:
    """NCCL's time-out if gloo's is `seconds`."""
    return timedelta(seconds=seconds + margin(seconds))


def set_environment(
    seconds: float,
    run_dir: Path | None,
    environment: MutableMapping[str, str] = os.environ,
    version: str = torch.__version__,
) -> None:
    """Set what torch reads when the process group is created; variables that the user has set stay.

    Args:
        seconds: gloo's time-out.
        run_dir: where the recordings go, once `make_folder` has made the folder; None: torch's default.
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
    """Make the folder of the recordings, if `set_environment` has chosen this run folder, which this run owns."""
    if _recording(run_dir) in environment.values():
        with contextlib.suppress(OSError):  # without it there is no recording
            (run_dir / FOLDER).mkdir(exist_ok=True)


def _recording(run_dir: Path) -> str:
    return str(run_dir / FOLDER / "rank_")
