"""Exact evaluation, however the test pictures divide among the ranks.

The pictures are cut into batches that do not depend on the world size; rank r takes batches r, r + W, ... The metrics
are torchmetrics', reduced over the ranks by sums of counts. Sums over pictures are taken in picture order once every
rank's part is in place, so that the loss, too, is the same number for every world size.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from k8scifar import parallel
from k8scifar.address import local
from k8scifar.data.augment import Pictures
from k8scifar.parallel import World


class Stopped(Exception):
    """The ranks agreed to stop in the midst of an evaluation."""


@dataclass(frozen=True)
class Outcome:
    """Figures of an evaluation, and what each picture gave (tensors [pictures], in order)."""

    figures: dict[str, Any]
    samples: torch.Tensor  # indices of the pictures
    losses: torch.Tensor  # float64
    predictions: torch.Tensor  # int64
    confusion: torch.Tensor  # int64 [classes, classes]: rows are the true classes


def evaluate(
    net: nn.Module,
    pictures: Pictures,
    world: World,
    *,
    classes: int,
    pixels: int,
    batch: int,
    limit: int = 0,
    tta: bool = False,
    precision: str = "fp32",
    keep_going: Callable[[], bool] = lambda: True,
) -> Outcome:
    """Evaluate `net` on `pictures`; collective, and the same on all ranks.

    Args:
        pixels: resolution of the pictures, the one last trained at.
        batch: pictures a forward pass.
        limit: use only so many pictures, evenly spaced; 0: all.
        tta: also report the accuracy of the mean of the logits of a picture and its mirror image.
        keep_going: asked before each round of batches by all ranks; False on all ranks stops.

    Raises:
        Stopped: `keep_going` said so.
    """
    from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

    device, total = world.device, len(pictures)
    count = min(limit, total) if limit else total
    samples = (torch.arange(count) * total // count).to(device)
    top = min(5, classes)
    plain = MulticlassAccuracy(classes, average="micro").to(device)
    top5 = MulticlassAccuracy(classes, average="micro", top_k=top).to(device)
    each = MulticlassAccuracy(classes, average="none").to(device)
    confusion = MulticlassConfusionMatrix(classes).to(device)
    mirrored = MulticlassAccuracy(classes, average="micro").to(device)
    kept = _per_picture_metric(count).to(device)
    was_training = net.training
    net.eval()
    try:
        places = torch.arange(count, device=device).split(batch)
        for first in range(0, len(places), world.size):
            if not keep_going():
                raise Stopped
            if first + world.rank >= len(places):
                continue
            at = places[first + world.rank]
            labels = pictures.labels[samples[at]]
            inputs = pictures.plain(samples[at], pixels)
            with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                logits = net(inputs).float()
                both = (logits + net(inputs.flip(3)).float()) / 2 if tta else None
            for metric in (plain, top5, each, confusion):
                metric.update(logits, labels)
            kept.update(at, F.cross_entropy(logits, labels, reduction="none"), logits.argmax(1))
            if both is not None:
                mirrored.update(both, labels)
    finally:
        net.train(was_training)
    losses, predictions = kept.compute()
    figures = {
        "accuracy": plain.compute().item(),
        "top5": top5.compute().item(),
        "loss": losses.mean().item(),
        "per_class": [round(value, 6) for value in each.compute().tolist()],
        "pictures": count,
    }
    if tta:
        figures["accuracy_tta"] = mirrored.compute().item()
    return Outcome(figures, samples.cpu(), losses.cpu(), predictions.cpu(), confusion.compute().cpu())


def _per_picture_metric(count: int) -> Any:
    """A torchmetrics Metric of dense arrays: each picture's place is filled by one rank, and sums join them exactly."""
    from torchmetrics import Metric

    class PerPicture(Metric):
        full_state_update = False

        def __init__(self) -> None:
            super().__init__()
            self.add_state("losses", torch.zeros(count, dtype=torch.float64), dist_reduce_fx="sum")
            self.add_state("predictions", torch.zeros(count, dtype=torch.int64), dist_reduce_fx="sum")

        def update(self, at: torch.Tensor, losses: torch.Tensor, predictions: torch.Tensor) -> None:
            self.losses[at] = losses.double()
            self.predictions[at] = predictions

        def compute(self) -> tuple[torch.Tensor, torch.Tensor]:
            return self.losses, self.predictions

    return PerPicture()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Command line of `k8scifar evaluate`."""
    parser.add_argument("checkpoint", help="a checkpoint (.pt), exported weights (.safetensors) or a run folder")
    parser.add_argument(
        "--data-dir", default="data", metavar="DIR", help="folder of the packed data set (default: data)"
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="sets", help="one value")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """`k8scifar evaluate`."""
    outcome, classes = measure(local(args.checkpoint), local(args.data_dir), args.sets)
    if outcome is not None:
        print(json.dumps(outcome.figures) if args.json else describe(outcome.figures, classes))
    return 0


def measure(path: Path, data_dir: Path, sets: Sequence[str] = ()) -> tuple[Outcome | None, list[str]]:
    """Evaluate the model at `path` on the test pictures: outcome (None on ranks but the first) and class names.

    Raises UserError where there is no model, no data, or they do not fit each other.
    """
    from k8scifar.data.packed import read
    from k8scifar.data.prepare import require
    from k8scifar.errors import UserError
    from k8scifar.settings import load
    from k8scifar.trained import open_model

    trained = open_model(path)
    manifest = require(data_dir)
    if manifest.classes != trained.classes:
        raise UserError(
            f"{path} knows the classes {', '.join(trained.classes)}, the data set in {data_dir} has "
            f"{', '.join(manifest.classes)}; point --data-dir at the data it was trained on"
        )
    split = read(data_dir, manifest, "test")
    config = load(sets=sets)
    with parallel.join(config) as world:
        images, labels = (torch.from_numpy(array).to(world.device) for array in (split.images, split.labels))
        pictures = Pictures(images, labels, trained.mean, trained.std)
        outcome = evaluate(
            trained.net.to(world.device),
            pictures,
            world,
            classes=len(trained.classes),
            pixels=trained.pixels,
            batch=config.evaluation.batch,
            tta=True,
            precision=parallel.resolve_precision(config, world),
        )
        return (outcome if world.leads else None), trained.classes


def describe(figures: dict[str, Any], classes: list[str]) -> str:
    """The figures as lines for a person."""
    lines = [
        f"test accuracy {figures['accuracy']:.2%}, with flip TTA {figures['accuracy_tta']:.2%}, "
        f"top-5 {figures['top5']:.2%}, loss {figures['loss']:.4f}, {figures['pictures']:,} pictures"
    ]
    lines += [f"  {name:<12} {accuracy:.2%}" for name, accuracy in zip(classes, figures["per_class"], strict=True)]
    return "\n".join(lines)
