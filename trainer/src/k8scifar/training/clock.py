"""Measure the parts of a step: data, compute, updates, waiting for communication."""

from __future__ import annotations

import time

import torch

PARTS = ("data", "compute", "updates", "communication", "between steps")
SHOWN = ("data", "compute", "communication")  # the optimiser's updates count as compute


class StepClock:
    """Add up the seconds of each part of the steps.

    On a CPU a mark is a reading of the clock. On a GPU it is an event on the stream, which is read later, so that the
    host does not wait.
    """

    def __init__(self, device: torch.device, running: bool = True) -> None:
        self._running = running
        self._cuda = device.type == "cuda"
        self._marks: list[tuple[str, float | torch.cuda.Event]] = []
        self._total = dict.fromkeys(PARTS, 0.0)
        self._read = dict(self._total)

    def mark(self, part: str) -> None:
        """Count the time up to the next mark as `part`; a part that is not in PARTS is not counted."""
        if not self._running:  # no rank reads this clock
            return
        if self._cuda:
            at = torch.cuda.Event(enable_timing=True)
            at.record()
        else:
            at = time.perf_counter()
        self._marks.append((part, at))

    def total(self) -> dict[str, float]:
        """Seconds in each of PARTS from the first mark to the last."""
        if self._cuda and self._marks:
            self._marks[-1][1].synchronize()
        for (part, start), (_, end) in zip(self._marks, self._marks[1:], strict=False):
            if part in self._total:
                self._total[part] += start.elapsed_time(end) / 1000 if self._cuda else end - start
        self._marks = self._marks[-1:]
        return dict(self._total)

    def read(self) -> dict[str, float]:
        """Seconds in each part of SHOWN since the last reading."""
        total = self.total()
        since = {part: total[part] - self._read[part] for part in PARTS}
        self._read = total
        since["compute"] += since["updates"]
        return {part: since[part] for part in SHOWN}
