"""Start-up, from the command to the first optimiser step, and what a checkpoint costs the loop."""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from pathlib import Path

from harness import PYTHON, Options, sets, shown, spread, train_steps

TITLE = "Start-up and checkpoints, two ranks"
COMMAND = "make bench ROWS=start"


def measure(options: Options) -> dict:
    """Recipe demo: the launcher's own first step three times, the split under plain torchrun, six checkpoints."""
    small = {"global_batch": 20, "micro_batch": 10} if options.tiny else {}
    arguments = sets(**small, hardware__threads=1)
    repetitions, steps = (1, 4) if options.tiny else (3, 20)
    first, runs = [], []
    for _ in range(repetitions):
        first.append(_launch(options, *arguments))
        runs.append(
            train_steps(options, 2, steps, *arguments, *sets(checkpoint__every_steps=2 if options.tiny else 10))
        )
    ordinary, after, stalls = [], [], []
    for run in runs:
        saved = set(run["saved_after"])
        stalls += run["stalls"]
        for number, seconds in enumerate(run["steps"], start=1):  # steps[i] ends step i + 2 and holds the save before
            late = bool(saved & {number, number - 1})
            (after if late else ordinary).append(seconds)
    stages = {name: spread([run["stages"][name] for run in runs]) for name in runs[0]["stages"]}
    return {
        "first_step": spread(first),
        "stages": stages,
        "stall": spread(stalls),
        "step": spread(ordinary),
        "step_with_save": spread(after),
    }


def _launch(options: Options, *arguments: str) -> float:
    """Seconds from `k8scifar launch` to its first optimiser step, told by the heartbeat."""
    with tempfile.TemporaryDirectory() as folder:
        heart = Path(folder) / "heart"
        command = [PYTHON, "-m", "k8scifar", "launch", "--nproc-per-node", "2", "--data-dir", str(options.data)]
        command += ["--runs-dir", folder, *arguments]
        begun = time.time()
        environment = os.environ | {"K8SCIFAR_HEARTBEAT": str(heart)}
        process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        try:
            log: list[str] = []
            for line in process.stderr:  # the first progress line comes after the heartbeat; a failure ends the loop
                log.append(line)
                if " world size " in line:
                    break
            while not heart.exists() and process.poll() is None:
                time.sleep(0.01)
            if not heart.exists():
                raise RuntimeError("".join(log))
            return time.time() - begun
        finally:
            process.terminate()
            process.communicate()


def lines(found: dict) -> list[tuple[str, str, str]]:
    """(what, measured, aim)."""
    split = ", ".join(f"{name} {value['median']:.1f}" for name, value in found["stages"].items())
    extra = found["step_with_save"]["median"] - found["step"]["median"]
    return [
        ("seconds from `k8scifar launch` to the first step", shown(found["first_step"]), "6 s"),
        ("of these, seconds (median, under torchrun)", split, ""),
        ("seconds that a save holds the loop", shown(found["stall"]), ""),
        (
            "what one save costs, its after-effects included",
            f"{max(extra, 0.0) / found['step']['median']:.2f} steps",
            "",
        ),
    ]
