"""How fast several machines train together, and each rank's own part in it, from the clocks of all ranks."""

from __future__ import annotations

from typing import Any

import torch

from k8scifar.exchange.shares import Shares, nodes
from k8scifar.ranks.agree import gather
from k8scifar.ranks.world import World
from k8scifar.training.clock import PARTS, StepClock

Times = dict[int, tuple[int, torch.Tensor]]  # pixels -> steps, seconds [world size, PARTS]


class Meter:
    """Adds up the steps of an epoch by resolution; does nothing unless `running`.

    The first step of a process is left out: it is slower than the others.
    """

    def __init__(self, clock: StepClock, world: World, running: bool) -> None:
        self._clock, self._world, self._running = clock, world, running
        self._is_first = True
        self._pixels, self._steps = 0, 0  # of the steps since the last look at the clock
        self._before: dict[str, float] | None = None
        self._found: dict[int, tuple[int, torch.Tensor]] = {}  # pixels -> steps, seconds of each of PARTS

    def begin(self, pixels: int) -> None:
        """A step at this resolution begins."""
        if not self._running or self._is_first:
            self._is_first = False
            return
        if self._before is None:
            self._before = self._clock.total()
        elif pixels != self._pixels:
            self._look()
        self._pixels = pixels
        self._steps += 1

    def _look(self) -> None:
        now = self._clock.total()
        if self._steps:
            spent = torch.tensor([now[part] - self._before[part] for part in PARTS], dtype=torch.float64)
            steps, so_far = self._found.get(self._pixels, (0, 0.0))
            self._found[self._pixels] = steps + self._steps, so_far + spent
        self._before, self._steps = now, 0

    def read(self) -> Times:
        """Pixels -> (steps, seconds [world size, PARTS]) since the last reading; the same on all ranks, collective."""
        if self._before is not None:
            self._look()
        found = {pixels: (steps, gather(spent, self._world)) for pixels, (steps, spent) in self._found.items()}
        self._found = {}
        return found


def own_seconds(found: Times, shares: Shares) -> list[float]:
    """Seconds of a micro-batch by rank, over all that `Meter.read` found: known before a rank waits for others."""
    steps = sum(count for count, _ in found.values())
    own = sum(spent[:, PARTS.index("data")] + spent[:, PARTS.index("compute")] for _, spent in found.values())
    return (own / steps / torch.tensor(shares.counts)).tolist()


def speed(found: Times, shares: Shares, world: World, global_batch: int) -> dict[str, Any] | None:
    """An epoch's record of how fast the machines were together and alone, None where that can't be compared.

    The wait for the network is what the rank waits that waits least: the others wait for it as well.
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
