"""What the rows share: the machine, ranks that train some steps, medians."""

from __future__ import annotations

import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PYTHON = sys.executable


class CannotRun(Exception):
    """This machine lacks what a row needs; the text says what."""


@dataclass(frozen=True)
class Options:
    """What a user chooses."""

    data: Path
    minutes: float  # of each contender in row `time`
    tiny: bool = False  # sizes that only show that a row works
    until: float = float("inf")  # Unix time at which the rows that need a GPU should be done

    def left(self) -> float:
        """Seconds until then."""
        return self.until - time.time()


def machine() -> dict[str, Any]:
    """The machine and the versions."""
    import torch

    import k8scifar
    from k8scifar import machine as cpu

    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        features = cpu.cpu_features(info)
        known = {"amx_bf16": "AMX-BF16", "avx512_bf16": "AVX512-BF16", "bf16": "ARM BF16", "avx512f": "AVX512"}
        flag = next((text for name, text in known.items() if name in features), "AVX2" * ("avx2" in features))
        flag = flag if cpu.has_bf16(features) else f"{flag or 'no AVX2'}, no bf16"
        held = os.environ.get("ONEDNN_MAX_CPU_ISA")
        flag = f"held to {held}" if held else flag
        name = f"{models[0] if models else name}, {os.cpu_count()} cores, {flag}"
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    versions = {"k8scifar": k8scifar.__version__, "torch": torch.__version__, "python": platform.python_version()}
    return {"machine": name, "gpu": gpu, "versions": versions, "load": os.getloadavg()[0]}


def spread(values: Sequence[float], digits: int = 4) -> dict[str, Any]:
    """Median, least, greatest and number."""
    rounded = [float(f"{value:.{digits}g}") for value in values]
    return {"median": statistics.median(rounded), "min": min(rounded), "max": max(rounded), "n": len(rounded)}


def shown(value: dict[str, Any], unit: str = "", digits: int = 3) -> str:
    """A spread in a table's cell."""
    numbers = [
        f"{value[key]:,.{digits}g}" if value[key] < 1000 else f"{value[key]:,.0f}" for key in ("median", "min", "max")
    ]
    return f"{numbers[0]}{unit} ({numbers[1]} to {numbers[2]}, n = {value['n']})"


def sets(**values: Any) -> list[str]:
    """`--set` options; a double underscore stands for a dot."""
    return [part for key, value in values.items() for part in ("--set", f"{key.replace('__', '.')}={value}")]


def torchrun(ranks: int) -> list[str]:
    """The start of a command line that starts ranks here."""
    return [PYTHON, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]


def call(command: Sequence[str], timeout: float = 3600, **environment: str) -> str:
    """Run to the end; returns stderr. Raises RuntimeError with its last lines."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command[:8]))} ... failed:\n{done.stderr[-3000:]}")
    return done.stderr


def steps_command(options: Options, out: Path, steps: int, *arguments: str) -> list[str]:
    """The trainer's own loop, stopped after `steps` steps: see steps.py."""
    runs = out.with_suffix(".runs")
    paths = ["--data-dir", str(options.data), "--runs-dir", str(runs), *sets(log__tensorboard="false")]
    return [str(HERE / "steps.py"), str(out), str(steps), *paths, *arguments]


def train_steps(options: Options, ranks: int, steps: int, *arguments: str, **environment: str) -> dict[str, Any]:
    """Train some steps in `ranks` ranks here; returns what steps.py found."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        command = [*torchrun(ranks), *steps_command(options, out, steps, *arguments)]
        call(command, BENCH_STARTED=str(time.time()), **environment)
        return json.loads(out.read_text())


def plain(options: Options, ranks: int, *arguments: str) -> dict[str, Any]:
    """Run plain_ddp.py; returns what it found."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        call([*torchrun(ranks), str(HERE / "plain_ddp.py"), "--data", str(options.data), "--out", str(out), *arguments])
        return json.loads(out.read_text())


def peak(processes: int, precision: str) -> float:
    """Matrix products in `bf16` or `fp32` of this many one-thread processes at once, FLOP/s of all together."""
    dtype = {"bf16": "bfloat16", "fp32": "float32"}[precision]
    text = f"""
import time, torch
torch.set_num_threads(1)
a, b = (torch.randn(2048, 2048).to(torch.{dtype}) for _ in range(2))
a @ b
best = 1e9
for _ in range(6):
    begun = time.perf_counter()
    a @ b
    best = min(best, time.perf_counter() - begun)
print(2 * 2048**3 / best)
"""
    running = [subprocess.Popen([PYTHON, "-c", text], stdout=subprocess.PIPE, text=True) for _ in range(processes)]
    return sum(float(process.communicate()[0]) for process in running)


def free_port() -> int:
    """A TCP port that nobody uses."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]
