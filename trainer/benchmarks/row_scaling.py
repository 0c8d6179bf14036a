"""Two hosts of one core each against one such host, over links of several speeds, in every mode; needs root."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from harness import HERE, PYTHON, CannotRun, Options, free_port, sets, spread, steps_command

TITLE = "Scaling efficiency, two hosts of one core each"
COMMAND = "make bench ROWS=scaling (root)"
MODES = ("allreduce", "bf16", "int8", "local-sgd", "auto")
REPEATS = 3
RATES = {"": ("allreduce", "auto"), "1gbit": MODES, "100mbit": MODES}
CORES = {"bench-0": 0, "bench-1": 1}  # host -> the core it is
AIMS = {"1gbit": "0.95 (auto)", "100mbit": "0.85 (auto)"}


def measure(options: Options) -> dict:
    """125 images of 16 pixels a host and step (recipe demo's first stage), seconds of the mean step.

    Both cores work in both cases: "one host" is two hosts that train alone, at the same time, so that shared caches
    and clocks do not count as communication. Alone is the mean of before and after each two modes. Bytes are those that
    the network interface of rank 0's host has counted, the first step left out.
    """
    sys.path.insert(0, str(HERE.parent / "tests" / "helpers"))
    if os.geteuid() or not all(map(shutil.which, ("ip", "tc", "unshare", "taskset"))) or (os.cpu_count() or 1) < 2:
        raise CannotRun("needs root, two cores, ip, tc, unshare and taskset")
    import hosts

    plan = {"": ("allreduce",), "100mbit": ("auto",)} if options.tiny else RATES
    repeats = 1 if options.tiny else REPEATS
    cells: dict[str, dict[str, list[dict]]] = {}
    with hosts.several(tuple(CORES)) as pair:
        for rate, modes in [(rate, modes) for _ in range(repeats) for rate, modes in plan.items()]:
            for host in pair:
                host.limit(rate)
            before = step(start(pair, options, "allreduce", together=False))
            for some in (modes[at : at + 2] for at in range(0, len(modes), 2)):
                trained = {mode: start(pair, options, mode, together=True) for mode in some}
                after = step(start(pair, options, "allreduce", together=False))
                for mode, found in trained.items():
                    cell = _cell(found, (before + after) / 2)
                    print(f"  {rate or 'no limit'} {mode}: {told(cell)}", flush=True)
                    cells.setdefault(rate or "no limit", {}).setdefault(mode, []).append(cell)
                before = after
    return {"cells": cells, "n": repeats}


def _cell(found: dict, alone: float) -> dict:
    """One measurement of a mode; `alone`: seconds a step of a host alone."""
    seconds = step(found)
    return {
        "efficiency": round(alone / seconds, 3), "step": seconds, "alone": alone, "mode": found["mode"],
        "said": found["said"], "label": found["label"], "exposed": found["split"]["communication"],
        "sent": found["sent"], "predicted": predicted(found["said"], found["label"]),
    }  # fmt: skip


def told(cell: dict) -> str:
    """A measurement in one line."""
    text = f"{cell['step']:.3f} s a step, alone {cell['alone']:.3f}: {cell['efficiency']}; {cell['sent']} MB sent"
    return text + f"; {cell['label']}, predicted {cell['predicted']} s" * bool(cell["predicted"])


def predicted(said: str, label: str) -> float | None:
    """Seconds a step that `auto` promised of what it took; None where nothing was measured.

    `label`: the mode as the log names it.
    """
    promises = dict(re.findall(r"([a-z0-9-]+(?: every \d+ steps)?) (\d+\.\d+)", said.partition("seconds a step: ")[2]))
    promise = promises.get(label.replace(", averaged", ""))
    return float(promise) if promise else None


def step(found: dict) -> float:
    """Seconds a step, the first ones left out; whole periods of local SGD."""
    steps = found["steps"][1:]
    return spread([sum(steps) / len(steps)])["median"]


def start(
    pair,
    options: Options,
    mode: str,
    together: bool,
    values: dict | None = None,
    steps: int = 0,
    started: Callable[[str, int], None] = lambda host, process: None,
) -> dict:
    """Train on these hosts, `together` or each for itself; what rank 0 (the slower one) found.

    Args:
        values: settings in place of a step's of this row.
        steps: how many; 0: this row's number.
        started: told the name of each host and its process.
    """
    # One more step than whole periods of local SGD, which are of 4, 6 or 8 steps.
    batch, usual = (4, 5) if options.tiny else (125, 25 if mode in ("local-sgd", "auto") else 10)
    steps = steps or usual
    ranks = 2 if together else 1
    values = {"global_batch": ranks * batch, "micro_batch": batch} | (values or {})
    values |= {"resolution": "[{until: 1.0, pixels: 16}]", "distributed__comm": mode, "hardware__threads": 1}
    running, outs, port = [], [], str(free_port())
    with tempfile.TemporaryDirectory() as folder:
        for rank, host in enumerate(pair):
            out = Path(folder) / f"{rank}.json"
            outs.append(out)
            environment = os.environ | {"OMP_NUM_THREADS": "1", "BENCH_STARTED": str(time.time())}
            if together:
                environment |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
                environment |= {"MASTER_ADDR": pair[0].name, "MASTER_PORT": port}
            command = [PYTHON, *steps_command(options, out, steps, *sets(**values))]
            log = Path(folder) / f"{rank}.log"
            core = str(CORES[host.name])
            running.append((host.popen(["taskset", "-c", core, *command], environment, log), log))
            started(host.name, running[-1][0].pid)
        for process, log in running:
            try:
                code = process.wait(600)
            except subprocess.TimeoutExpired:
                code = "none in ten minutes"
            if code:
                raise RuntimeError(f"exit code {code} in mode {mode}:\n{log.read_text()[-3000:]}")
        told = running[0][1].read_text().splitlines()
        said = {
            word: next((line.partition(f"{word}: ")[2] for line in told if f"{word}: " in line), "")
            for word in ("communication", "shares")
        }
        found = [json.loads(out.read_text()) for out in outs if out.exists()]
        return (
            max(found, key=step)
            | {"label": said["communication"].partition(";")[0]}
            | {"said": said["communication"], "shares": said["shares"]}
        )


def lines(found: dict) -> list[tuple[str, str, str]]:
    """(what, measured, aim)."""
    rows = []
    for rate, modes in found["cells"].items():
        told, sent, promises = [], [], []
        for mode, runs in modes.items():
            runs = runs if isinstance(runs, list) else [runs]  # a single one in former results
            efficiency = spread([run["efficiency"] for run in runs])
            taken = ", ".join(sorted({run["mode"] for run in runs}))
            range_ = f" ({efficiency['min']:.2f} to {efficiency['max']:.2f})" * (len(runs) > 1)
            told.append(f"{mode}{f' ({taken})' if mode == 'auto' else ''} {efficiency['median']:.2f}{range_}")
            if all(run.get("sent") for run in runs):  # former results do not say
                sent.append(f"{mode} {spread([run['sent'] for run in runs])['median']:.1f}")
            promises += [f"{run['predicted']:.3f}, {run['step']:.3f}" for run in runs if run.get("predicted")]
        rows.append((f"efficiency at {rate}, n = {found['n']}", ", ".join(told), AIMS.get(rate, "")))
        if sent:
            rows.append((f"MB a step that rank 0 sends, at {rate}", ", ".join(sent), ""))
        if promises:
            rows.append((f"seconds a step as auto predicts and as measured, at {rate}", "; ".join(promises), ""))
    return rows
