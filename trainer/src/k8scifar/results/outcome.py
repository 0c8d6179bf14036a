"""What an evaluation came to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from k8scifar.data.packed import Split

WORST = 32  # mistakes shown


@dataclass(frozen=True)
class Outcome:
    """Figures of an evaluation, and what each image gave (tensors [images], in order)."""

    figures: dict[str, Any]
    samples: torch.Tensor  # indices of the images
    losses: torch.Tensor  # float64
    predictions: torch.Tensor  # int64
    confusion: torch.Tensor  # int64 [classes, classes]: rows are the true classes


def mistakes(outcome: Outcome, split: Split) -> list[dict[str, Any]]:
    """The wrong images of the greatest loss: index in `split`, true and predicted class, loss."""
    labels = torch.as_tensor(split.labels)[outcome.samples]
    wrong = (outcome.predictions != labels).nonzero().squeeze(1)
    order = wrong[outcome.losses[wrong].argsort(descending=True)][:WORST]
    columns = (outcome.samples, labels, outcome.predictions, outcome.losses)
    names = ("image", "true", "predicted", "loss")
    return [
        dict(zip(names, row, strict=True)) for row in zip(*(column[order].tolist() for column in columns), strict=True)
    ]
