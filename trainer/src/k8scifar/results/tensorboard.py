"""TensorBoard's events of a run, written by rank 0 alone. A failing disk never stops the training."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from k8scifar.data.packed import Manifest, Split
from k8scifar.results.outcome import Outcome, mistakes


class Board:
    """Curves, texts and images; every method does nothing where `folder` is None.

    A write that fails is told through `warn`; nothing more is written then until the next evaluation, which begins a
    new file of events.
    """

    def __init__(self, folder: Path | None, step: int, warn: Callable[[str], None]) -> None:
        self._folder, self._warn = folder, warn
        self._writer: Any = None
        if folder is not None:
            _silence_writer_threads()
            self._open(step)

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Add a point to each named curve."""
        for name, value in values.items():
            self._write("add_scalar", name, value, step)

    def step(self, step: int, loss: float, lr: float, images_per_second: float, seconds: dict[str, float]) -> None:
        """Add a point to the step curves; `seconds`: where the time since the last point went, shown as shares."""
        total = sum(seconds.values()) or 1.0
        shares = {f"time/{part}": value / total for part, value in seconds.items()}
        self.scalars({"step/loss": loss, "step/lr": lr, "step/images_per_second": images_per_second} | shares, step)

    def text(self, name: str, text: str) -> None:
        """Add a text, shown as code."""
        self._write("add_text", name, "\n".join(f"    {line}" for line in text.splitlines()))

    def inputs(self, batch: torch.Tensor, manifest: Manifest, step: int) -> None:
        """Add a grid of augmented inputs, normalised [n, 3, h, w]."""
        if self._writer:
            from k8scifar.results import figures

            self._write("add_image", "inputs", figures.grid(batch[:32], manifest.mean, manifest.std), step)

    def outcome(self, outcome: Outcome, split: Split, classes: list[str], name: str, step: int) -> None:
        """Add an evaluation's confusion matrix and worst mistakes, and flush; `name`: what their names begin with."""
        if self._folder is not None and self._writer is None:
            self._open(step)
        if self._writer:
            from k8scifar.results import figures

            self._write("add_figure", f"{name}/confusion", figures.confusion(outcome.confusion, classes), step)
            wrong = mistakes(outcome, split)
            titles = [f"{classes[each['true']]} > {classes[each['predicted']]}" for each in wrong]
            images = split.images[[each["image"] for each in wrong]]
            self._write("add_figure", f"{name}/worst_mistakes", figures.mistakes(images, titles), step)
            self._write("flush")

    def close(self) -> None:
        """Flush and close."""
        self._write("close")

    def _open(self, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        try:
            # Points of a former attempt beyond this step are dropped by TensorBoard.
            self._writer = SummaryWriter(str(self._folder), purge_step=step, flush_secs=30)
        except OSError as error:
            self._failed(error)

    def _write(self, method: str, *arguments: Any) -> None:
        if self._writer:
            try:
                getattr(self._writer, method)(*arguments)
            except OSError as error:
                self._failed(error)

    def _failed(self, error: OSError) -> None:
        self._writer = None
        self._warn(f"TensorBoard's events could not be written ({error.strerror or error}); training goes on")


def _silence_writer_threads() -> None:
    """TensorBoard's thread hands its error to the next write and then dies of it: that is no news for stderr."""
    before = threading.excepthook

    def hook(args: threading.ExceptHookArgs) -> None:
        if not (isinstance(args.exc_value, OSError) and type(args.thread).__module__.startswith("tensorboard.")):
            before(args)

    threading.excepthook = hook
