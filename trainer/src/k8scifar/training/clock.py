"""Where a step's time goes: data, compute, the optimiser, waiting on communication."""

from __future__ import annotations

import time

import torch

PARTS = ("data", "compute", "updates", "communication", "between steps")
SHOWN = ("data", "compute", "communication")  # the optimiser's updates count as compute


class StepClock:
    """Adds up the time of each part of the steps.

    On a CPU a mark is a reading of the clock. On a GPU it is an event on the stream, read only when asked for, so that
    marking never makes the host wait.
    """

    def __init__(self, device: torch.device, running: bool = True) -> None:
        self._running = running
        self._cuda = device.type == "cuda"
        self._marks: list[tuple[str, float | torch.cuda.Event]] = []
        self._total = dict.fromkeys(PARTS, 0.0)
        self._read = dict(self._total)

    def mark(self, part: str) -> None:
        """What follows, up to the next mark, belongs to `part`; any name that is not in PARTS is not counted."""
        if not self._running:  # nobody will read it
            return
        if self._cuda:
            at = torch.cuda.Event(enable_timing=True)
            at.record()
        else:
            at = time.perf_counter()
        self._marks.append((part, at))

    def total(self) -> dict[str, float]:
        """Seconds in each of PARTS since the beginning, up to the last mark."""
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
