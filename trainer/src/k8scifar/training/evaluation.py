"""Exact evaluation, however the test images divide among the ranks.

The images are cut into batches that do not depend on the world size; the ranks take them in turn, a faster rank more
of them. The metrics are torchmetrics', reduced over the ranks by sums of counts. Sums over images are taken in image
order once every rank's part is in place, so that the loss, too, is the same number for every world size.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from k8scifar.data.augment import Images
from k8scifar.ranks.device import autocast
from k8scifar.ranks.world import World
from k8scifar.results.outcome import Outcome

SHIFT = 1  # pixels of the stored image, up and left or down and right, of a shifted view


class Stopped(Exception):
    """The ranks agreed to stop in the midst of an evaluation."""


def evaluate(
    net: nn.Module,
    images: Images,
    world: World,
    *,
    classes: int,
    pixels: int,
    batch: int,
    limit: int = 0,
    tta: bool | str = False,
    precision: str = "fp32",
    turns: Sequence[int] = (),
    keep_going: Callable[[], bool] = lambda: True,
) -> Outcome:
    """Evaluate `net` on `images`; collective, and the same on all ranks.

    Args:
        pixels: resolution of the images, the one last trained at.
        batch: images a forward pass.
        limit: use only this many images, evenly spaced; 0: all.
        turns: batches of each round by rank; empty: one each.
        tta: also report the accuracy of the mean of the logits of an image and its mirror image; "shifts": besides,
            that of the mean of this and of the four of both shifted by SHIFT (source: Jordan, 94% on CIFAR-10 in 3.29
            Seconds on a Single GPU, 2024), for which `images` need that border.
        keep_going: asked before each round of batches by all ranks; False on all ranks stops.

    Raises:
        Stopped: `keep_going` said so.
    """
    from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

    device, total = world.device, len(images)
    count = min(limit, total) if limit else total
    samples = (torch.arange(count) * total // count).to(device)
    top = min(5, classes)
    plain = MulticlassAccuracy(classes, average="micro").to(device)
    top5 = MulticlassAccuracy(classes, average="micro", top_k=top).to(device)
    each = MulticlassAccuracy(classes, average="none").to(device)
    confusion = MulticlassConfusionMatrix(classes).to(device)
    mirrored, shifted = (MulticlassAccuracy(classes, average="micro").to(device) for _ in range(2))
    kept = _per_image_metric(count).to(device)
    was_training = net.training
    net.eval()
    try:
        places = torch.arange(count, device=device).split(batch)
        takers = [rank for rank, count in enumerate(turns or [1] * world.size) for _ in range(count)]
        for first in range(0, len(places), len(takers)):
            if not keep_going():
                raise Stopped
            for at, taker in zip(places[first : first + len(takers)], takers, strict=False):
                if taker != world.rank:
                    continue
                labels = images.labels[samples[at]]
                inputs = images.plain(samples[at], pixels)
                with torch.inference_mode(), autocast(device, precision):
                    logits = net(inputs).float()
                    both = (logits + net(inputs.flip(3)).float()) / 2 if tta else None
                    if tta == "shifts":
                        parts = [images.plain(samples[at], pixels, shift) for shift in (-SHIFT, SHIFT)]
                        others = [net(part).float() for moved in parts for part in (moved, moved.flip(3))]
                        shifted.update(both / 2 + sum(others) / 8, labels)
                for metric in (plain, top5, each, confusion):
                    metric.update(logits, labels)
                kept.update(at, F.cross_entropy(logits, labels, reduction="none"), logits.argmax(1))
                if both is not None:
                    mirrored.update(both, labels)
    finally:
        net.train(was_training)
    with warnings.catch_warnings():  # a rank without images has updated no metric: that is no news
        warnings.filterwarnings("ignore", "The ``compute`` method of metric", UserWarning)
        losses, predictions = kept.compute()
        figures = {
            "accuracy": plain.compute().item(),
            "top5": top5.compute().item(),
            "loss": losses.mean().item(),
            "per_class": [round(value, 6) for value in each.compute().tolist()],
            "images": count,
        }
        if tta:
            figures["accuracy_tta"] = mirrored.compute().item()
        if tta == "shifts":
            figures["accuracy_tta_shifts"] = shifted.compute().item()
        matrix = confusion.compute()
    return Outcome(figures, samples.cpu(), losses.cpu(), predictions.cpu(), matrix.cpu())


def _per_image_metric(count: int) -> Any:
    """A torchmetrics Metric of dense arrays: each image's place is filled by one rank, and sums join them exactly."""
    from torchmetrics import Metric

    class PerImage(Metric):
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

    return PerImage()
