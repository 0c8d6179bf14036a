"""The cost model of a step: it decides the ranks' shares, the owners of matrices and the mode of communication.

Symbols, of rank r; all times in seconds:

    n_r  micro-batches in a step
    c_r  one micro-batch: augmentation, forward, backward     measured by `trials.measure_speeds` when the ranks meet,
    u_r  Muon's directions of all matrices; 0 with SGD        each rank computing without the others. From then on
    p_r  one plain SGD step of all weights                    scaled at each epoch's end by the step clocks
    x_m  time that the exchange in mode m adds to a pass; it includes Muon's divided directions. Measured by
         `trials.measure_modes`: one pass with exchange minus one pass without
    a    one all-reduce of all gradients in bfloat16, measured there too
    H    steps between two averagings of local SGD
    F_r, N_r  operations and numbers of the matrices that rank r owns; s_r is its speed, the slowest rank's is 1

Shares (`Speeds.step`): each rank computes, takes its own plain step, and spends about as long on its part of the
exchange. Muon's directions begin when the last rank has its gradients, and are divided by speed:

    T(n) = max_r(n_r c_r + 2 p_r) + 1 / sum_r(1 / u_r)

Mode of communication (`predict`; the plain step is the same in all modes and left out). Local SGD has equal shares, all
of Muon's directions on each rank, and sends int8, half of bfloat16:

    T(m) = max_r(n_r c_r) + x_m                     m in {allreduce, bf16, int8}
    T(local SGD) = n max_r(c_r) + max_r(u_r) + a / (2 H)

Owners (`divide_owners`): a rank is done after F_r / s_r + 5000 N_r operations, 5000 for each number's way to its owner
and back. The largest matrices are assigned first, each to the rank that would be done first.

Measured error of T(m) (trainer/benchmarks/README.md, row scaling, two hosts of one core, n = 3 each): the measured step
is 1 to 17 % longer than predicted without a limit on the wire, 3 to 16 % longer at 1 Gb/s, 22 to 35 % at 100 Mb/s. T(n)
misses what the exchange takes from a slow processor, so `shares.choose_shares` times two divisions before it decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

GAIN = 1.1  # a new division must promise a step so many times faster; measurement noise is below that
PLAIN_STEPS = 2.0  # p_r counts twice: once for the optimiser, once for this rank's part of the exchange
PER_NUMBER = 5000.0  # operations of a core while a number travels to its owner and back, at 1 Gb/s
GOOD = 0.95  # the most exact mode is chosen that reaches this fraction of the fastest mode's speed
PERIODS = (0.5, 0.75, 1)  # H, in units of distributed.local_sgd_steps


@dataclass(frozen=True)
class Speeds:
    """What each rank needs when it computes without the others; lists by rank."""

    micro_batch: list[float]  # c_r
    updates: list[float]  # u_r
    pixels: int  # height and width of the images
    rest: list[float] = field(default_factory=list)  # p_r; empty in former checkpoints

    @property
    def plain(self) -> list[float]:
        """p_r; 0.0 if it has not been measured."""
        return self.rest or [0.0] * len(self.micro_batch)

    def busy(self, counts: Sequence[int]) -> list[float]:
        """n_r c_r + 2 p_r of each rank."""
        parts = zip(counts, self.micro_batch, self.plain, strict=True)
        return [count * each + PLAIN_STEPS * own for count, each, own in parts]

    def step(self, counts: Sequence[int]) -> float:
        """T(n), without the wire."""
        return max(self.busy(counts)) + self._directions()

    def least(self, micro_batches: int) -> float:
        """The least T(n), if micro-batches were divisible: all ranks are then busy for the same time."""
        rates = [1 / each for each in self.micro_batch]
        fixed = sum(rate * own for rate, own in zip(rates, self.busy([0] * len(rates)), strict=True))
        return (micro_batches + fixed) / sum(rates) + self._directions()

    def _directions(self) -> float:
        """1 / sum_r(1 / u_r)."""
        return 1 / sum(1 / each for each in self.updates) if all(self.updates) else 0.0

    def alone(self, nodes: list[list[int]], micro_batches: int, global_batch: int) -> list[float]:
        """Images/s of each node if it trained alone: its ranks share the batch, and none of them waits for the wire."""
        steps = [
            micro_batches * own + updates + plain
            for own, updates, plain in zip(self.micro_batch, self.updates, self.plain, strict=True)
        ]
        return [global_batch * len(ranks) ** 2 / sum(steps[rank] for rank in ranks) for ranks in nodes]

    def now(self, seconds: list[float]) -> Speeds:
        """Scale the speeds to what training measured since: c_r in `seconds`, at any resolution.

        The fastest rank keeps its times. Another rank's times all grow by the factor by which its c_r grew.
        """
        fastest = seconds.index(min(seconds))
        scale = self.micro_batch[fastest] / seconds[fastest]
        times = [scale * now / then for now, then in zip(seconds, self.micro_batch, strict=True)]
        parts = (self.micro_batch, self.updates, self.plain)
        own, updates, rest = ([by * each for by, each in zip(times, part, strict=True)] for part in parts)
        return Speeds(own, updates, self.pixels, rest)


def divide_shares(micro_batches: int, speeds: Speeds) -> list[int]:
    """The n with the least T(n): one micro-batch for each rank, then each further one to the rank that is done first.

    Raises ValueError if there are more ranks than micro-batches.
    """
    ranks = len(speeds.micro_batch)
    if micro_batches < ranks:
        raise ValueError(f"{ranks} ranks can't share {micro_batches} micro-batches")
    counts = [1] * ranks
    for _ in range(micro_batches - ranks):
        done = speeds.busy([count + 1 for count in counts])
        counts[done.index(min(done))] += 1
    return counts


def better(counts: list[int], speeds: Speeds) -> list[int]:
    """The division with the least T(n) if it is clearly faster than `counts`; else `counts`."""
    best = divide_shares(sum(counts), speeds)
    return best if speeds.step(counts) > GAIN * speeds.step(best) else counts


def neighbour(counts: Sequence[int], speeds: Speeds) -> list[int] | None:
    """`counts` with one micro-batch moved from the rank that is done last to the rank that would be done first.

    None if the last rank has only one.
    """
    busy = speeds.busy(counts)
    last = busy.index(max(busy))
    if counts[last] == 1:
        return None
    done = speeds.busy([count + 1 for count in counts])
    first = min((rank for rank in range(len(counts)) if rank != last), key=lambda rank: done[rank])
    return [count + (rank == first) - (rank == last) for rank, count in enumerate(counts)]


def divide_owners(costs: Sequence[float], sizes: Sequence[int], speeds: Sequence[float]) -> list[int]:
    """Assign each matrix to an owner.

    Args:
        costs: floating point operations of each matrix's update.
        sizes: numbers in each matrix.
        speeds: s_r; all ranks have the same wire.
    """
    busy, owners = [(0.0, 0.0)] * len(speeds), [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda index: -(costs[index] + PER_NUMBER * sizes[index])):
        with_it = [(work + costs[index], load + PER_NUMBER * sizes[index]) for work, load in busy]
        done = [work / speed + load for (work, load), speed in zip(with_it, speeds, strict=True)]
        owners[index] = done.index(min(done))
        busy[owners[index]] = with_it[owners[index]]
    return owners


@dataclass(frozen=True)
class Choice:
    """A mode of modes.MODES, and the steps between two averagings of local SGD."""

    mode: str
    every: int

    def __str__(self) -> str:
        return f"{self.mode} every {self.every} steps" if self.mode == "local-sgd" else self.mode


@dataclass(frozen=True)
class Times:
    """What the choice of a mode needs, in seconds of the slowest rank."""

    movement: float  # a, with rounding to bfloat16 and back
    compute: float  # n max_r(c_r), n being the mean of n_r
    exposed: dict[str, float]  # x_m by mode, the most exact first
    updates: float = 0.0  # max_r(u_r)
    divided: float | None = None  # max_r(n_r c_r); None: as `compute`


def predict(times: Times, every: int) -> dict[Choice, float]:
    """T(m) of each mode; `every`: the greatest H of local SGD."""
    compute = times.compute if times.divided is None else times.divided
    seconds = {Choice(mode, every): compute + extra for mode, extra in times.exposed.items()}
    for period in (max(1, round(part * every)) for part in PERIODS):
        seconds[Choice("local-sgd", period)] = times.compute + times.updates + times.movement / 2 / period
    return seconds


def best(steps: dict[Choice, float]) -> Choice:
    """The most exact choice that is nearly as fast as the fastest."""
    fastest = min(steps.values())
    return next(choice for choice, seconds in steps.items() if fastest >= GOOD * seconds)
