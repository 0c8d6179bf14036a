"""Accuracy under each mode of communication after equally many epochs."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from harness import Options, call, sets, torchrun

TITLE = "Accuracy under each mode of communication"
COMMAND = "make bench ROWS=modes"
# With the steps between two averagings of local SGD, of which `auto` takes 4 to 8.
MODES = (("allreduce", 8), ("bf16", 8), ("int8", 8), ("local-sgd", 4), ("local-sgd", 8))
SEEDS = (0, 1, 2)


def measure(options: Options) -> dict:
    """Recipe demo for one epoch of all images at 8 pixels in two ranks, by seed; all test images."""
    batch = {"global_batch": 20, "micro_batch": 10} if options.tiny else {"global_batch": 250, "micro_batch": 125}
    values = batch | {"epochs": 1, "resolution": "[{until: 1.0, pixels: 8}]", "augment__translate": 2}
    values |= {"evaluation__tta": "false", "hardware__threads": 1, "log__tensorboard": "false"}
    accuracy: dict[str, list[float]] = {}
    images = 0
    for seed in SEEDS[: 1 if options.tiny else None]:
        for mode, every in MODES[: 1 if options.tiny else None]:
            name = f"{mode} every {every} steps" if mode == "local-sgd" else mode
            with tempfile.TemporaryDirectory() as folder:
                chosen = sets(**values, seed=seed, distributed__comm=mode, distributed__local_sgd_steps=every)
                paths = ["--data-dir", str(options.data), "--runs-dir", folder, "--name", "run"]
                call([*torchrun(2), "-m", "k8scifar", "train", *paths, *chosen])
                summary = json.loads((Path(folder) / "run" / "summary.json").read_text())
            accuracy.setdefault(name, []).append(summary["accuracy"])
            images = summary["test_images"]
            print(f"  {name}, seed {seed}: {summary['accuracy']:.2%}", flush=True)
    return {"accuracy": accuracy, "images": images, "n": len(accuracy["allreduce"])}


def lines(found: dict) -> list[tuple[str, str, str]]:
    """(what, measured, aim)."""
    every = {mode: value if isinstance(value, list) else [value] for mode, value in found["accuracy"].items()}
    told = [f"{mode} {sum(values) / len(values):.2%}" for mode, values in every.items()]  # one value in former results
    what = f"mean test accuracy on {found['images']:,} images after 1 epoch at 8 pixels, n = {found['n']} seeds"
    return [(what, ", ".join(told), "as allreduce, 0.3 less at most")]
