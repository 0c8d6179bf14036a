"""Cores, GPUs, CPU features and network interfaces that this process may use."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from k8scifar.errors import UserError

# Prints the number of GPUs of the driver at argv[1]; 0 where it fails, nothing where there is none.
ASK_DRIVER = """
import ctypes, sys
driver, count = ctypes.CDLL(sys.argv[1]), ctypes.c_int(0)
print(count.value if driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 else 0)
"""


def usable_cpus(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the cores of this process's affinity, at most the container's CPU limit (cgroup v2 cpu.max, or v1)."""
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
    """Return the names of this machine's network interfaces; empty where they can't be listed."""
    try:
        return sorted(entry.name for entry in folder.iterdir())
    except OSError:
        return []


def check_interface(name: str, setting: str, there: list[str] | None = None) -> None:
    """Raise UserError where a network interface of a comma-separated list is not there; `setting` holds the list."""
    there = interfaces() if there is None else there
    missing = [part for part in name.split(",") if part and part not in there]
    if missing and there:
        raise UserError(
            f"{setting} is {', '.join(missing)}, which this machine does not have ({', '.join(there)}); "
            "set it to one of these, or leave it empty to choose automatically"
        )


def cpu_features(info: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """Return the processors' features as Linux lists them (x86: `flags`, ARM: `Features`); empty on other systems.

    Leaves out bf16 instructions that the environment variable ONEDNN_MAX_CPU_ISA forbids to oneDNN.
    """
    with contextlib.suppress(OSError):
        found = re.findall(r"^(?:flags|Features)\s*:(.*)$", info.read_text(), re.MULTILINE)
        there = frozenset.intersection(*(frozenset(line.split()) for line in found)) if found else frozenset()
        return there - _barred(os.environ.get("ONEDNN_MAX_CPU_ISA", ""))
    return frozenset()


def _barred(most: str) -> set[str]:
    """Return the bf16 instructions of x86 beyond `most`, a value of ONEDNN_MAX_CPU_ISA."""
    most = most.upper()
    if "AMX" in most or most in ("", "ALL", "DEFAULT"):
        return set()
    bf16 = any(word in most for word in ("BF16", "FP16", "AVX10"))
    return {"amx_bf16"} if bf16 else {"amx_bf16", "avx512_bf16"}


def has_bf16(features: frozenset[str]) -> bool:
    """Return whether processors multiply bf16 in hardware."""
    return not features.isdisjoint({"avx512_bf16", "amx_bf16", "bf16"})  # the last is ARM's


def fast_bf16(info: Path = Path("/proc/cpuinfo")) -> bool:
    """Return whether processors multiply bf16 several times faster than float32: Intel with AMX, AMD with AVX512."""
    features = cpu_features(info)
    with contextlib.suppress(OSError):
        amd = re.search(r"^vendor_id\s*:\s*AuthenticAMD$", info.read_text(), re.MULTILINE)
        return "amx_bf16" in features or (amd is not None and "avx512_bf16" in features)
    return False


def usable_gpus(environment: Mapping[str, str]) -> int:
    """Return the number of GPUs that this process's torch can use; 0 for a CPU build."""
    with contextlib.suppress(metadata.PackageNotFoundError):
        if metadata.version("torch").endswith("+cpu"):
            return 0
    return visible_gpus(environment)


def visible_gpus(environment: Mapping[str, str], devices: Path = Path("/dev"), driver: str = "libcuda.so.1") -> int:
    """Return the number of NVIDIA GPUs that this process may use, from the driver or else from device files.

    The driver is loaded in a child process, because it keeps files and threads open. WSL2 has /dev/dxg instead of one
    file for each GPU.
    """
    names = [entry.name for entry in devices.glob("*")]
    found = sum(bool(re.fullmatch(r"nvidia\d+", name)) for name in names)
    if found or "dxg" in names:
        with contextlib.suppress(OSError, subprocess.SubprocessError, ValueError):
            command = [sys.executable, "-c", ASK_DRIVER, driver]
            done = subprocess.run(command, env=dict(environment), capture_output=True, text=True, timeout=60)
            return int(done.stdout)
    chosen = environment.get("CUDA_VISIBLE_DEVICES")
    return found if chosen is None else chosen_gpus(chosen, found)


def chosen_gpus(chosen: str, there: int) -> int:
    """Return how many of `there` GPUs CUDA_VISIBLE_DEVICES leaves; CUDA stops at the first entry that is wrong.

    Args:
        chosen: numbers, or unique ids (GPU-..., MIG-...; a process gets one MIG device).
    """
    names = [name.strip() for name in chosen.split(",")]
    if names[0].startswith("MIG-"):
        return min(1, there)
    if names[0].startswith("GPU-"):
        ids = list(itertools.takewhile(lambda name: name.startswith("GPU-"), names))
        return min(len(set(ids)) if len(set(ids)) == len(ids) else 0, there)
    numbers = [int(match[0]) if (match := re.match(r"\d+", name)) else -1 for name in names]
    good = list(itertools.takewhile(lambda number: 0 <= number < there, numbers))
    return len(good) if len(set(good)) == len(good) else 0
