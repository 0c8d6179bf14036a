"""What people see of a training as it goes: progress on stderr, curves on TensorBoard; on rank 0 alone."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

import torch

from k8scifar.config.schema import Config
from k8scifar.data.packed import Manifest
from k8scifar.results.progress import Progress
from k8scifar.results.tensorboard import Board


class Steps(Protocol):
    """How many steps there are."""

    @property
    def steps(self) -> int: ...

    @property
    def steps_per_epoch(self) -> int: ...

    def work(self, step: int) -> float: ...


class Display:
    """A run's progress line and curves; shows nothing unless `shown`. `hint`: see Progress."""

    def __init__(
        self, config: Config, manifest: Manifest, plan: Steps, first_step: int, shown: bool, hint: str = ""
    ) -> None:
        self._config, self._manifest, self._plan = config, manifest, plan
        self._shown, self._first = shown, first_step
        self._progress = Progress(plan.steps, first_step, config.log.every_seconds, shown, plan.work, hint)
        self.write = self._progress.write
        self.board = Board(config.run_dir if shown and config.log.tensorboard else None, first_step, self.write)
        self.resume(first_step)

    def resume(self, step: int) -> None:
        """Take the rate from here on: what came before (an evaluation, a checkpoint) was no step."""
        self._since, self._since_time = step, time.monotonic()

    def step(
        self,
        step: int,
        loss: Callable[[], float],
        lr: float,
        inputs: torch.Tensor,
        seconds: Callable[[], dict[str, float]],
    ) -> None:
        """Show that `step` steps are done, where that is due.

        Args:
            loss: reads the step's, on this rank, which a GPU may still be computing.
            inputs: the last micro-batch, [n, 3, height, width].
            seconds: tells where the time since the last point of the curves went.
        """
        if not self._shown:
            return
        is_first = step == self._first + 1
        curves_due = step % self._config.log.every_steps == 0 or is_first
        line_due = self._progress.due(step)
        if line_due or curves_due:
            now = time.monotonic()
            rate = (step - self._since) * self._config.global_batch / max(now - self._since_time, 1e-9)
            if line_due:
                self._progress.step(step, step / self._plan.steps_per_epoch, loss(), lr, rate)
            if curves_due:
                self.board.step(step, loss(), lr, rate, seconds())
                self._since, self._since_time = step, now
        if is_first:
            self._progress.begin(step)
        if is_first or step % self._plan.steps_per_epoch == 0:
            self.board.inputs(inputs, self._manifest, step)

    def text(self, name: str, text: str) -> None:
        """A text on TensorBoard."""
        self.board.text(name, text)

    def close(self) -> None:
        """Finish what is being written, and leave the terminal as it was."""
        self.board.close()
        self._progress.close()
