"""Training FLOPs to 94, 95 and 96 %: the recipes that aim there, on a GPU."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from harness import CannotRun, Options, call

TITLE = "Training FLOPs to accuracy"
COMMAND = "make bench-gpu ROWS=flops"
GPU = True
AIMS = {"quick": "94 % in 2.2 PFLOP", "standard": "95.5 % in 6.7 PFLOP", "best": "96 %"}


def measure(options: Options) -> dict:
    """Each recipe once, on all visible GPUs, from its summary."""
    import torch

    if not torch.cuda.is_available():
        raise CannotRun("needs a GPU: make bench-gpu")
    found = {}
    for recipe in AIMS:
        with tempfile.TemporaryDirectory() as folder:
            paths = ["--data-dir", str(options.data), "--runs-dir", folder, "--name", "run"]
            call(["k8scifar", "launch", "--recipe", recipe, *paths], timeout=6 * 3600)
            summary = json.loads((Path(folder) / "run" / "summary.json").read_text())
            keys = ("accuracy", "accuracy_tta", "training_flops", "seconds", "world_size")
            found[recipe] = {key: summary[key] for key in keys}
    return {"recipes": found, "n": 1}


def lines(found: dict) -> list[tuple[str, str, str]]:
    """(what, measured, aim)."""
    return [
        (
            f"recipe {recipe}, n = {found['n']}",
            f"{run['accuracy']:.2%} (TTA {run['accuracy_tta']:.2%}), {run['training_flops'] / 1e15:.2f} PFLOP, "
            f"{run['seconds']:.0f} s on {run['world_size']} GPU(s)",
            AIMS[recipe],
        )
        for recipe, run in found["recipes"].items()
    ]
