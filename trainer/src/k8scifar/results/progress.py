"""Progress for people: a bar on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

from k8scifar.results.evaluated import figure, word_of
from k8scifar.results.summary import beside

BAR_EVERY = 0.25  # seconds between two looks at a bar
ESTIMATE_AFTER = 3.0  # seconds of steps, the first left out, that tell how long the rest will take
LONG = 900.0  # seconds, beyond which a shorter training is offered


class Progress:
    """Shows one run's progress on stderr; `shown` is False on ranks that stay silent.

    Args:
        steps, first: of the whole run; done when this process starts.
        every_seconds: between two lines where there is no terminal.
        work: how much work the steps before one are, in any unit: what is left of it is the time that is left.
        hint: follows the first estimate where that is long.
    """

    def __init__(
        self, steps: int, first: int, every_seconds: float, shown: bool, work: Callable[[int], float], hint: str
    ) -> None:
        self._steps, self._every, self._shown, self._work, self._hint = steps, every_seconds, shown, work, hint
        self._start = self._last_time = time.monotonic()
        self._first: int | None = None  # the step from which the speed is measured
        self._estimated = False
        self._bar = None
        if shown and sys.stderr.isatty():
            self._bar = tqdm(total=steps, initial=first, unit="step", dynamic_ncols=True, leave=False, mininterval=0)

    def due(self, step: int) -> bool:
        """Whether something should be shown now that `step` steps are done: reading a loss waits for the GPU."""
        every = self._every if self._bar is None else BAR_EVERY
        return self._shown and (
            time.monotonic() - self._last_time >= every or (step == self._steps and bool(self._bar))
        )

    def begin(self, step: int) -> None:
        """Measure the speed from here on: the first step is slower than the others."""
        self._start, self._first = time.monotonic(), step

    def step(self, step: int, epoch: float, loss: float, lr: float, images_per_second: float) -> None:
        """Show that `step` steps are done."""
        now = time.monotonic()
        done = 0.0 if self._first is None else self._work(step) - self._work(self._first)
        left = (now - self._start) / done * (self._work(self._steps) - self._work(step)) if done else 0.0
        self._last_time = now
        if not self._estimated and done and now - self._start >= ESTIMATE_AFTER and self._shown:
            self._estimated = True
            hint = self._hint if left > LONG else ""
            self.write(f"about {_minutes(left)} to go at this machine's speed, evaluations apart{hint}")
        if self._bar is not None:
            told = f"epoch {epoch:.2f} loss {loss:.3f} {images_per_second:,.0f} img/s"
            self._bar.set_postfix_str(told, refresh=False)
            self._bar.update(step - self._bar.n)
        elif self._shown:
            self.write(
                f"step {step}/{self._steps} epoch {epoch:.2f} loss {loss:.4f} lr {lr:.4f} "
                f"{images_per_second:,.0f} images/s" + (f", {_minutes(left)} left" if done else "")
            )

    def write(self, text: str) -> None:
        """A line of its own."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        elif self._shown:
            print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.close()


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.0f} s"


def epoch_line(record: dict[str, Any], epochs: int) -> str:
    """An epoch's record in one line."""
    found = ""
    if (accuracy := figure(record, "accuracy")) is not None:
        found = f", {word_of(record)} accuracy {accuracy:.2%}{beside(record)} loss {figure(record, 'loss'):.4f}"
        found += f" ({figure(record, 'images'):,} images)"
    return (
        f"epoch {record['epoch']}/{epochs}: train loss {record['train_loss']:.4f} accuracy "
        f"{record['train_accuracy']:.2%}{found}, {record['pixels']} pixels, {record['images_per_second']:,.0f} images/s"
    )
