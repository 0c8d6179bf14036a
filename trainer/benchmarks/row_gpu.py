"""One GPU: images/s, fraction of its bf16 peak, share of the data path, peak memory, with and without compiling."""

from __future__ import annotations

import time

from harness import CannotRun, Options, sets, shown, spread, train_steps

TITLE = "One GPU"
COMMAND = "make bench-gpu ROWS=gpu"
GPU = True
SETTLED = 100  # as steps.py has it


def measure(options: Options) -> dict:
    """Recipe standard, 300 steps; plain and compiled in turn, three times, or fewer where time is short."""
    import torch

    if not torch.cuda.is_available():
        raise CannotRun("needs a GPU: make bench-gpu")
    runs: dict[str, list[dict]] = {"eager": [], "compiled": []}
    peaks = []
    took = 0.0
    for _ in range(3):
        begun = time.monotonic()
        if options.left() < 2 * took:  # half of it is for the other rows
            break
        peaks.append(_peak())
        for name in runs:
            compiled = str(name == "compiled").lower()
            arguments = ["--recipe", "standard", *sets(hardware__compile=compiled, log__every_steps=1000)]
            runs[name].append(train_steps(options, 1, 300, *arguments))
        took = time.monotonic() - begun
    return {name: _figures(found, peaks) for name, found in runs.items()}


def _figures(found: list[dict], peaks: list[float]) -> dict:
    rates = [run["batch"] * len(run["steps"][SETTLED:]) / sum(run["steps"][SETTLED:]) for run in found]
    return {
        "images_per_second": spread(rates),
        "of_peak": spread([rate * run["flops"] / peak for rate, run, peak in zip(rates, found, peaks, strict=True)]),
        "data_share": spread([run["split"]["data"] / sum(run["split"].values()) for run in found]),
        "peak_memory": spread([run["peak_memory"] / 2**30 for run in found]),
    }


def _peak() -> float:
    """bf16 matrix products, FLOP/s."""
    import torch

    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for _ in range(5):
        a @ b
    torch.cuda.synchronize()
    begun = time.perf_counter()
    for _ in range(20):
        a @ b
    torch.cuda.synchronize()
    return 20 * 2 * 8192**3 / (time.perf_counter() - begun)


def lines(found: dict) -> list[tuple[str, str, str]]:
    """(what, measured, aim)."""
    rows = []
    for name, run in found.items():
        rows += [
            (f"images/s, recipe standard, {name}", shown(run["images_per_second"]), ""),
            (f"fraction of the measured bf16 peak, {name}", shown(run["of_peak"]), "0.5"),
            (f"data path's share of a step, {name}", shown(run["data_share"]), "under 0.02"),
            (f"peak memory, GiB, {name}", shown(run["peak_memory"]), ""),
        ]
    return rows
