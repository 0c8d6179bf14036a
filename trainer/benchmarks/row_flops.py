"""Training FLOPs to 94, 95 and 96 %: the recipes that aim there, on a GPU."""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from pathlib import Path

from harness import CannotRun, Options, call

TITLE = "Training FLOPs to accuracy"
COMMAND = "make bench-gpu ROWS=flops"
GPU = True
EPOCHS = {"quick": 18, "standard": 80, "best": 120}  # as the recipes have it
AIMS = {"quick": "94 % with TTA in 2.2 PFLOP", "standard": "95.5 % in 6.7 PFLOP", "best": "96 %"}


def measure(options: Options) -> dict:
    """Each recipe once, on all visible GPUs, from its summary; one that would take longer than there is time is not."""
    import torch

    if not torch.cuda.is_available():
        raise CannotRun("needs a GPU: make bench-gpu")
    found, left_out, epoch = {}, {}, 0.0  # seconds an epoch, start and end of a run included
    for recipe in AIMS:
        wanted = epoch * EPOCHS[recipe]
        if wanted > options.left():
            left_out[recipe] = f"not run: needs about {wanted / 60:.0f} min more; make gpu GPU_MINUTES=60"
            continue
        begun = time.monotonic()
        try:
            found[recipe] = _train(options, recipe)
        except subprocess.TimeoutExpired:
            left_out[recipe] = "not run to its end: longer than there was time; make gpu GPU_MINUTES=60"
        epoch = (time.monotonic() - begun) / EPOCHS[recipe]
    return {"recipes": found, "left_out": left_out, "n": 1}


def _train(options: Options, recipe: str) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        paths = ["--data-dir", str(options.data), "--runs-dir", folder, "--name", "run"]
        call(["k8scifar", "launch", "--recipe", recipe, *paths], timeout=min(6 * 3600, max(1.0, options.left())))
        summary = json.loads((Path(folder) / "run" / "summary.json").read_text())
        return {key: summary[key] for key in ("accuracy", "accuracy_tta", "training_flops", "seconds", "world_size")}


def lines(found: dict) -> list[tuple[str, str, str]]:
    """(what, measured, aim)."""
    rows = [
        (
            f"recipe {recipe}, n = {found['n']}",
            f"{run['accuracy']:.2%} (TTA {run['accuracy_tta']:.2%}), {run['training_flops'] / 1e15:.2f} PFLOP, "
            f"{run['seconds']:.0f} s on {run['world_size']} GPU(s)",
            AIMS[recipe],
        )
        for recipe, run in found["recipes"].items()
    ]
    return rows + [(f"recipe {recipe}", why, AIMS[recipe]) for recipe, why in found["left_out"].items()]
