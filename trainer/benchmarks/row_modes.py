"""Accuracy under each mode of communication after equally many epochs."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from harness import Options, call, sets, torchrun

TITLE = "Accuracy under each mode of communication"
COMMAND = "make bench ROWS=modes"
MODES = ("allreduce", "bf16", "fp16", "powersgd", "local-sgd")


def measure(options: Options) -> dict:
    """One epoch of all pictures at 8 pixels in two ranks, global batch 250, seed 0; all test pictures."""
    batch = {"global_batch": 20, "micro_batch": 10} if options.tiny else {"global_batch": 250, "micro_batch": 125}
    values = batch | {"epochs": 1, "resolution": "[{until: 1.0, pixels: 8}]", "augment__translate": 2}
    values |= {"evaluation__tta": "false", "hardware__threads": 1, "log__tensorboard": "false"}
    accuracy, pictures = {}, 0
    for mode in MODES[:1] if options.tiny else MODES:
        with tempfile.TemporaryDirectory() as folder:
            paths = ["--data-dir", str(options.data), "--runs-dir", folder, "--name", "run"]
            call([*torchrun(2), "-m", "k8scifar", "train", *paths, *sets(**values, distributed__comm=mode)])
            summary = json.loads((Path(folder) / "run" / "summary.json").read_text())
            accuracy[mode], pictures = summary["accuracy"], summary["test_pictures"]
        print(f"  {mode}: {accuracy[mode]:.2%}", flush=True)
    return {"accuracy": accuracy, "pictures": pictures, "n": 1}


def lines(found: dict) -> list[tuple[str, str, str]]:
    """(what, measured, aim)."""
    told = ", ".join(f"{mode} {value:.2%}" for mode, value in found["accuracy"].items())
    what = f"test accuracy on {found['pictures']:,} pictures after 1 epoch at 8 pixels, seed 0, n = {found['n']}"
    return [(what, told, "as allreduce")]
