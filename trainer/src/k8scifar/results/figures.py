"""Images for TensorBoard and the report: input grids, curves, the confusion matrix, the worst mistakes."""

from __future__ import annotations

import io
import math

import matplotlib
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

matplotlib.rcParams["text.parse_math"] = False  # a class may be called $\frac

# Colours that can be read on white and on black: the report's page may be either.
INK, LINE, FIRST, SECOND, FAINT = "#78828f", "#8b95a255", "#3f7fdc", "#d9692f", "#7fa3dc99"
SERIES = {
    "each step": (FAINT, 0.8),
    "training": (FIRST, 1.6),
    "test": (SECOND, 1.6),
    "held-out": (SECOND, 1.6),
}  # colour, line width
# A blue that shines through, for a background of any colour.
SHADE = LinearSegmentedColormap.from_list("shade", [(0.15, 0.39, 0.75, 0.0), (0.15, 0.39, 0.75, 1.0)])


def grid(batch: torch.Tensor, mean: list[float], std: list[float], columns: int = 8) -> torch.Tensor:
    """Normalised images [n, 3, h, w] as one image, float32 [3, H, W] in 0..1."""
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
    axes.imshow(shares.numpy(), cmap=SHADE, vmin=0, vmax=100, interpolation="none")
    axes.set_xticks(range(len(classes)), classes, rotation=45, ha="right")
    axes.set_yticks(range(len(classes)), classes)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    for row, values in enumerate(shares.tolist()):
        for column, value in enumerate(values):
            if value >= 0.5:
                colour = "white" if value > 50 else INK
                axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=9, color=colour)
    _colour(axes, size=10)
    return figure


def curves(series: dict[str, list[tuple[float, float]]], percent: bool = False) -> Figure:
    """Curves over epochs, those of SERIES by name."""
    figure = Figure(figsize=(4.8, 2.7), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    shown = {name: points for name, points in series.items() if points}
    for name, points in shown.items():
        colour, width = SERIES[name]
        marker = "o" if len(points) <= 40 else None
        axes.plot(*zip(*points, strict=True), color=colour, linewidth=width, marker=marker, markersize=3, label=name)
    axes.set_xlabel("epoch")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(color=LINE, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if percent:
        axes.yaxis.set_major_formatter(lambda value, _: f"{value * 100:g} %")
    if len(shown) > 1:
        axes.legend(frameon=False, labelcolor=INK, fontsize=8)
    _colour(axes)
    return figure


def bars(values: dict[str, float], beside: float) -> Figure:
    """Images a second by name as horizontal bars, the last in a colour of its own; a line at `beside`, the ideal."""
    figure = Figure(figsize=(6.4, 0.7 + 0.36 * len(values)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    places = range(len(values) - 1, -1, -1)
    axes.barh(places, values.values(), color=[FIRST] * (len(values) - 1) + [SECOND], height=0.62)
    for place, value in zip(places, values.values(), strict=True):
        inside = value > 0.15 * max(values.values())
        colour, side = ("white", "right") if inside else (INK, "left")
        axes.text(value, place, f" {value:,.0f} ", ha=side, va="center", color=colour, fontsize=9)
    axes.axvline(beside, color=INK, linewidth=1.0, linestyle="--")
    axes.set_yticks(places, values)
    axes.set_xlim(0, 1.12 * max(*values.values(), beside))
    axes.set_xlabel("images a second; dashed: the sum of the machines alone")
    axes.spines[["top", "right"]].set_visible(False)
    _colour(axes, size=9)
    return figure


def scaling(counts: list[int], rates: list[float], unit: str = "ranks") -> Figure:
    """Speed-up and efficiency over the number of `unit`, beside the ideal; `rates`: images a second."""
    figure = Figure(figsize=(8.4, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    speedups = [rate / rates[0] * counts[0] for rate in rates]
    efficiencies = [speedup / count for speedup, count in zip(speedups, counts, strict=True)]
    for axes, ideal, measured, title in (
        (left, counts, speedups, "speed-up"),
        (right, [1.0] * len(counts), efficiencies, "efficiency"),
    ):
        axes.plot(counts, ideal, color=INK, linewidth=1.0, linestyle="--", label="ideal")
        axes.plot(counts, measured, color=SECOND, linewidth=1.6, marker="o", markersize=4, label="measured")
        axes.set(xlabel=unit, ylabel=title, xticks=counts, ylim=(0, 1.08 * max(*ideal, *measured)))
        axes.grid(color=LINE, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, labelcolor=INK, fontsize=8, loc="lower right")
        _colour(axes)
    return figure


def over_minutes(series: dict[str, list[tuple[float, float]]]) -> Figure:
    """Accuracies (0 to 1) over minutes of training, a curve for each name, the last one in the second colour."""
    figure = Figure(figsize=(7.2, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    styles = ("-", "--", ":", "-.")
    for index, (name, points) in enumerate(series.items()):
        colour = SECOND if index == len(series) - 1 else FIRST
        minutes, accuracies = zip(*points, strict=True) if points else ((), ())
        axes.plot(minutes, accuracies, color=colour, linewidth=1.6, linestyle=styles[index % 4], label=name)
    axes.set(xlabel="minutes of training", ylabel="accuracy", ylim=(0, 1))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value * 100:g} %")
    axes.grid(color=LINE, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, labelcolor=INK, fontsize=8, loc="lower right")
    _colour(axes)
    return figure


def svg(figure: Figure) -> str:
    """A figure as an <svg> element without a background; equal for equal figures."""
    content = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "k8scifar"}):
        figure.savefig(content, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = content.getvalue()
    return text[text.index("<svg") :]


def _colour(axes, size: int = 8) -> None:
    """Give an axes' own lines and words their colours."""
    axes.tick_params(color=LINE, labelcolor=INK, labelsize=size)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set(color=INK, size=size)
    for spine in axes.spines.values():
        spine.set_color(LINE)


def mistakes(images: torch.Tensor, titles: list[str], columns: int = 8) -> Figure:
    """Images uint8 [n, h, w, 3], each under its title."""
    rows = max(1, math.ceil(len(images) / columns))
    figure = Figure(figsize=(columns * 1.3, rows * 1.6), layout="constrained")
    FigureCanvasAgg(figure)
    for index, axes in enumerate(figure.subplots(rows, columns, squeeze=False).flat):
        axes.axis("off")
        if index < len(images):
            axes.imshow(images[index])
            axes.set_title(titles[index], fontsize=7)
    return figure
