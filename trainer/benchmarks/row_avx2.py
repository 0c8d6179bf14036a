"""Row `time` as on a processor without bf16, emulated: oneDNN, MKL and torch's kernels kept to AVX2, float32."""

from __future__ import annotations

import os

import row_time
from harness import Options

TITLE = "Time to accuracy, two ranks, oneDNN, MKL and torch kept to AVX2, float32"
COMMAND = "make bench ROWS=avx2 BENCH_MINUTES=10"
ISA = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}


def measure(options: Options) -> dict:
    """As row_time.measure; both contenders read the environment when they start."""
    before = {name: os.environ.get(name) for name in ISA}
    os.environ.update(ISA)
    try:
        return row_time.measure(options)  # precision `auto` heeds ONEDNN_MAX_CPU_ISA
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def lines(found: dict) -> list[tuple[str, str, str]]:
    """(what, measured, aim)."""
    return [(f"AVX2, float32: {what}", value, "") for what, value, _ in row_time.lines(found)]
