"""`k8scifar evaluate`: evaluate a trained model on the test images."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from k8scifar.config import loading
from k8scifar.data.augment import Images
from k8scifar.data.packed import Manifest, read
from k8scifar.data.prepare import require
from k8scifar.errors import UserError
from k8scifar.inference.trained import open_model
from k8scifar.ranks.device import resolve_precision
from k8scifar.ranks.world import join
from k8scifar.results.outcome import Outcome
from k8scifar.results.summary import augmented, beside
from k8scifar.training.evaluation import SHIFT, evaluate
from k8scifar.urls import local

# Keys of the configuration that an evaluation reads.
READ = (
    "evaluation.tta", "evaluation.batch", "hardware.device", "hardware.precision", "hardware.threads",
    "hardware.deterministic", "distributed.backend", "distributed.interface", "distributed.timeout_seconds",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Command line of `k8scifar evaluate`."""
    parser.add_argument("checkpoint", help="a checkpoint (.pt), exported weights (.safetensors) or a run folder")
    parser.add_argument(
        "--data-dir", default="data", metavar="DIR", help="folder of the packed data set (default: data)"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="sets", help="one value, repeatable"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """`k8scifar evaluate`."""
    outcome, manifest = measure(local(args.checkpoint), local(args.data_dir), args.sets)
    if outcome is not None:
        figures = outcome.figures | {"data": manifest.source}
        print(json.dumps(figures) if args.json else describe(figures, manifest.classes))
    return 0


def measure(path: Path, data_dir: Path, sets: Sequence[str] = ()) -> tuple[Outcome | None, Manifest]:
    """Evaluate the model at `path` on the test images; return outcome (None on ranks but 0) and data set.

    Raises UserError if the model or the data is missing, or their classes differ.
    """
    config = loading.load(sets=sets)
    loading.check_read(sets, READ, "evaluate")
    trained = open_model(path)
    manifest = require(data_dir)
    if manifest.classes != trained.classes:
        raise UserError(
            f"{path} has the classes {', '.join(trained.classes)}, the data set in {data_dir} has "
            f"{', '.join(manifest.classes)}; set --data-dir to the data it was trained on"
        )
    split = read(data_dir, manifest, "test")
    tta = config.evaluation.tta
    with join(config) as world:
        arrays = (torch.from_numpy(array).to(world.device) for array in (split.images, split.labels))
        images = Images(*arrays, trained.mean, trained.std, SHIFT if tta == "shifts" else 0)
        outcome = evaluate(
            trained.net.to(world.device),
            images,
            world,
            classes=len(trained.classes),
            pixels=trained.pixels,
            batch=config.evaluation.batch,
            tta=tta,
            precision=resolve_precision(config, world.device, world.host_group).name,
        )
        return (outcome if world.is_main else None), manifest


def describe(figures: dict[str, Any], classes: list[str]) -> str:
    """The figures as text."""
    lines = [
        f"test accuracy {figures['accuracy']:.2%}{beside(figures)}{augmented(figures)}, "
        f"top-5 {figures['top5']:.2%}, loss {figures['loss']:.4f}, {figures['images']:,} images"
    ]
    lines += [f"  {name:<12} {accuracy:.2%}" for name, accuracy in zip(classes, figures["per_class"], strict=True)]
    return "\n".join(lines)
