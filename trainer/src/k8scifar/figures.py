"""Pictures for TensorBoard: input grids, the confusion matrix, the worst mistakes."""

from __future__ import annotations

import math

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def grid(batch: torch.Tensor, mean: list[float], std: list[float], columns: int = 8) -> torch.Tensor:
    """Normalised pictures [n, 3, h, w] as one picture, float32 [3, H, W] in 0..1."""
    images = batch.float().cpu() * torch.tensor(std).view(3, 1, 1) + torch.tensor(mean).view(3, 1, 1)
    n, _, height, width = images.shape
    rows = math.ceil(n / columns)
    sheet = torch.ones(3, rows * (height + 2), columns * (width + 2))
    for index, image in enumerate(images.clamp(0, 1)):
        top, left = (index // columns) * (height + 2), (index % columns) * (width + 2)
        sheet[:, top : top + height, left : left + width] = image
    return sheet


def confusion(matrix: torch.Tensor, classes: list[str]) -> Figure:
    """The confusion matrix, int64 [classes, classes] (rows true, columns predicted), in per cent of the true class."""
    figure = Figure(figsize=(1.5 + 0.55 * len(classes), 1.2 + 0.5 * len(classes)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    shares = matrix.double() / matrix.sum(1, keepdim=True).clamp(min=1) * 100
    axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=100)
    axes.set_xticks(range(len(classes)), classes, rotation=45, ha="right")
    axes.set_yticks(range(len(classes)), classes)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    for row, values in enumerate(shares.tolist()):
        for column, value in enumerate(values):
            if value >= 0.5:
                colour = "white" if value > 50 else "black"
                axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=7, color=colour)
    return figure


def mistakes(images: torch.Tensor, titles: list[str], columns: int = 8) -> Figure:
    """Pictures uint8 [n, h, w, 3], each under its title."""
    rows = max(1, math.ceil(len(images) / columns))
    figure = Figure(figsize=(columns * 1.3, rows * 1.6), layout="constrained")
    FigureCanvasAgg(figure)
    for index, axes in enumerate(figure.subplots(rows, columns, squeeze=False).flat):
        axes.axis("off")
        if index < len(images):
            axes.imshow(images[index])
            axes.set_title(titles[index], fontsize=7)
    return figure
