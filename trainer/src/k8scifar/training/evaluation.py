"""Exact evaluation, however the images divide among the ranks.

The images are cut into batches that do not depend on the world size. The ranks take the batches in turn, a faster rank
more of them. torchmetrics adds up counts over the ranks. Sums over images are taken in the order of the images, once
every rank's part is in place, so that the loss is the same number for every world size.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
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
    """The ranks agreed to stop during an evaluation."""


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
        batch: images in a forward pass.
        limit: use only this many images, evenly spaced; 0: all.
        turns: batches of each round by rank; empty: one each.
        tta: also report the accuracy of the mean of the logits of an image and its mirror image. "shifts": also that
            of the mean of this and of the four of both shifted by SHIFT (source: Jordan, 94% on CIFAR-10 in 3.29
            Seconds on a Single GPU, 2024), for which `images` need that border.
        keep_going: all ranks call it before each round of batches; it returns the same on all.

    Raises:
        Stopped: `keep_going` returned False.
    """
    device, total = world.device, len(images)
    count = min(limit, total) if limit else total
    samples = (torch.arange(count) * total // count).to(device)
    metrics = _Metrics(classes, count, tta, device)
    with _evaluating(net):
        for at in _own_batches(count, batch, world, turns, keep_going):
            inputs = images.plain(samples[at], pixels)
            with torch.inference_mode(), autocast(device, precision):
                logits = _logits(net, inputs, tta)
                if tta == "shifts":
                    parts = [images.plain(samples[at], pixels, shift) for shift in (-SHIFT, SHIFT)]
                    logits["accuracy_tta_shifts"] = _with_shifts(net, logits["accuracy_tta"], parts)
            metrics.update(at, images.labels[samples[at]], logits)
    return metrics.outcome(samples)


def _own_batches(
    count: int, batch: int, world: World, turns: Sequence[int], keep_going: Callable[[], bool]
) -> Iterator[torch.Tensor]:
    """The places, among `count` images, of each batch that this rank evaluates. Raises Stopped."""
    places = torch.arange(count, device=world.device).split(batch)
    takers = [rank for rank, each in enumerate(turns or [1] * world.size) for _ in range(each)]
    for first in range(0, len(places), len(takers)):
        if not keep_going():
            raise Stopped
        for at, taker in zip(places[first : first + len(takers)], takers, strict=False):
            if taker == world.rank:
                yield at


@contextlib.contextmanager
def _evaluating(net: nn.Module) -> Iterator[None]:
    """Evaluation mode within; the former mode afterwards."""
    was_training = net.training
    net.eval()
    try:
        yield
    finally:
        net.train(was_training)


def _logits(net: nn.Module, inputs: torch.Tensor, tta: bool | str) -> dict[str, torch.Tensor]:
    """Float32 [n, classes] by the figure that they are for: of the images, and of the mean with their mirror images."""
    logits = net(inputs).float()
    if not tta:
        return {"accuracy": logits}
    return {"accuracy": logits, "accuracy_tta": (logits + net(inputs.flip(3)).float()) / 2}


def _with_shifts(net: nn.Module, both: torch.Tensor, parts: list[torch.Tensor]) -> torch.Tensor:
    """The mean of `both`, an image's and its mirror image's logits, and of those of its shifted `parts`."""
    others = [net(part).float() for moved in parts for part in (moved, moved.flip(3))]
    return both / 2 + sum(others) / 8


class _Metrics:
    """torchmetrics' figures of the batches that this rank evaluates; `outcome` combines the ranks."""

    def __init__(self, classes: int, count: int, tta: bool | str, device: torch.device) -> None:
        from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

        names = ["accuracy", *["accuracy_tta"] * bool(tta), *["accuracy_tta_shifts"] * (tta == "shifts")]
        self._count = count
        self._accuracies = {name: MulticlassAccuracy(classes, average="micro").to(device) for name in names}
        self._top5 = MulticlassAccuracy(classes, average="micro", top_k=min(5, classes)).to(device)
        self._per_class = MulticlassAccuracy(classes, average="none").to(device)
        self._confusion = MulticlassConfusionMatrix(classes).to(device)
        self._per_image = _per_image_metric(count).to(device)

    def update(self, at: torch.Tensor, labels: torch.Tensor, logits: dict[str, torch.Tensor]) -> None:
        """Count one batch. `at`: places of its images among all; `logits`: by figure."""
        plain = logits["accuracy"]
        for metric in (self._top5, self._per_class, self._confusion):
            metric.update(plain, labels)
        self._per_image.update(at, F.cross_entropy(plain, labels, reduction="none"), plain.argmax(1))
        for name, metric in self._accuracies.items():
            metric.update(logits[name], labels)

    def outcome(self, samples: torch.Tensor) -> Outcome:
        """The figures over all ranks' batches; collective."""
        with warnings.catch_warnings():  # torchmetrics warns on a rank that evaluated no batch
            warnings.filterwarnings("ignore", "The ``compute`` method of metric", UserWarning)
            losses, predictions = self._per_image.compute()
            accuracies = {name: metric.compute().item() for name, metric in self._accuracies.items()}
            figures = {
                "accuracy": accuracies.pop("accuracy"),
                "top5": self._top5.compute().item(),
                "loss": losses.mean().item(),
                "per_class": [round(value, 6) for value in self._per_class.compute().tolist()],
                "images": self._count,
                **accuracies,
            }
            confusion = self._confusion.compute()
        return Outcome(figures, samples.cpu(), losses.cpu(), predictions.cpu(), confusion.cpu())


def _per_image_metric(count: int) -> Any:
    """A torchmetrics Metric of dense arrays: one rank fills the place of an image, and sums over the ranks are exact.

    The class is made here because importing torchmetrics takes a second.
    """
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
