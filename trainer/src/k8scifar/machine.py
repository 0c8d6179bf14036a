"""What this machine offers a process: cores, GPUs, network interfaces."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path

from k8scifar.errors import UserError


def usable_cpus(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Cores this process may use: its affinity, cut to the container's CPU limit (cgroup v2 cpu.max, or v1)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = (cgroup / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota = (cgroup / "cpu/cpu.cfs_quota_us").read_text().strip()
            period = (cgroup / "cpu/cpu.cfs_period_us").read_text().strip()
        except OSError:
            return cores
    if quota == "max" or int(quota) <= 0:
        return cores
    return max(1, min(cores, math.floor(int(quota) / int(period) + 0.01)))


def interfaces(folder: Path = Path("/sys/class/net")) -> list[str]:
    """Names of this machine's network interfaces; empty where the system does not tell."""
    try:
        return sorted(entry.name for entry in folder.iterdir())
    except OSError:
        return []


def check_interface(name: str, said_by: str, there: list[str] | None = None) -> None:
    """Raise UserError where a network interface is not there; `said_by` is what names it. Several: by commas."""
    there = interfaces() if there is None else there
    missing = [part for part in name.split(",") if part and part not in there]
    if missing and there:
        raise UserError(
            f"{said_by} names {', '.join(missing)}, which this machine does not have ({', '.join(there)}); "
            "name one of these, or leave it empty to have it chosen"
        )


def visible_gpus(environment: Mapping[str, str], devices: Path = Path("/dev")) -> int:
    """NVIDIA GPUs this process may use: CUDA_VISIBLE_DEVICES where set, else the device files."""
    if (chosen := environment.get("CUDA_VISIBLE_DEVICES")) is not None:
        names = [name.strip() for name in chosen.split(",")]
        return names.index("-1") if "-1" in names else sum(bool(name) for name in names)
    return sum(bool(re.fullmatch(r"nvidia\d+", entry.name)) for entry in devices.glob("nvidia*"))
