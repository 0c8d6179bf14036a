"""Measure how fast the machines train together, and how long each rank computes, by the clocks of all ranks."""

from __future__ import annotations

from typing import Any

import torch

from k8scifar.exchange.shares import Shares, nodes
from k8scifar.ranks.agree import gather
from k8scifar.ranks.world import World
from k8scifar.training.clock import PARTS, StepClock

Times = dict[int, tuple[int, torch.Tensor]]  # pixels -> steps, seconds [world size, PARTS]


class Meter:
    """Add up the seconds of an epoch's steps by resolution; does nothing unless `running`.

    The first step of a process does not count, because it is slower than the others.
    """

    def __init__(self, clock: StepClock, world: World, running: bool) -> None:
        self._clock, self._world, self._running = clock, world, running
        self._is_first = True
        self._pixels, self._steps = 0, 0  # of the steps since the clock was last read
        self._before: dict[str, float] | None = None
        self._found: dict[int, tuple[int, torch.Tensor]] = {}  # pixels -> steps, seconds of each of PARTS

    def begin(self, pixels: int) -> None:
        """Count a step at this resolution, which begins now."""
        if not self._running or self._is_first:
            self._is_first = False
            return
        if self._before is None:
            self._before = self._clock.total()
        elif pixels != self._pixels:
            self._read_clock()
        self._pixels = pixels
        self._steps += 1

    def _read_clock(self) -> None:
        now = self._clock.total()
        if self._steps:
            spent = torch.tensor([now[part] - self._before[part] for part in PARTS], dtype=torch.float64)
            steps, so_far = self._found.get(self._pixels, (0, 0.0))
            self._found[self._pixels] = steps + self._steps, so_far + spent
        self._before, self._steps = now, 0

    def read(self) -> Times:
        """Times of the steps since the last call; collective, and the same on all ranks."""
        if self._before is not None:
            self._read_clock()
        found = {pixels: (steps, gather(spent, self._world)) for pixels, (steps, spent) in self._found.items()}
        self._found = {}
        return found


def own_seconds(found: Times, shares: Shares) -> list[float]:
    """Seconds that each rank takes for a micro-batch, without waiting for other ranks. `found`: as Meter.read."""
    steps = sum(count for count, _ in found.values())
    own = sum(spent[:, PARTS.index("data")] + spent[:, PARTS.index("compute")] for _, spent in found.values())
    return (own / steps / torch.tensor(shares.counts)).tolist()


def speed(found: Times, shares: Shares, world: World, global_batch: int) -> dict[str, Any] | None:
    """An epoch's record of the machines' images/s together and alone; None where no rank measured its speed.

    The wait for the network is that of the rank that waits least: the others also wait for that rank.
    """
    if shares.speeds is None or shares.speeds.pixels not in found:
        return None
    steps, spent = found[shares.speeds.pixels]
    seconds = spent[0].sum().item()
    alone = shares.speeds.alone(nodes(world), sum(shares.counts), global_batch)
    return {
        "pixels": shares.speeds.pixels,
        "alone": [round(each, 1) for each in alone],
        "together": round(steps * global_batch / max(seconds, 1e-9), 1),
        "network": round(spent[:, PARTS.index("communication")].min().item() / max(seconds, 1e-9), 4),
        "shares": shares.counts,
    }
