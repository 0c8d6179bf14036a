"""Who computes how much: the micro-batches of a global batch, divided among the ranks by their speeds.

A division decides only the order in which gradients are added up. It is kept all the same: the checkpoint holds it, and
a run that resumes at the same world size goes on with it, so that it stays equal to an uninterrupted one, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from k8scifar.config.schema import Config
from k8scifar.exchange.local_sgd import LocalSGD
from k8scifar.ranks.world import World

GAIN = 1.1  # times as fast a division must promise to be before it takes the place of the one there is: noise is less
PLAIN_STEPS = 2.0  # of the optimiser: as long as its own one and its part in the exchange take a rank's processor
MANY = 8  # ranks, beyond which their shares are not told one by one


@dataclass(frozen=True)
class Speeds:
    """What each rank needs alone, without its peers; lists by rank."""

    micro_batch: list[float]  # seconds: augmenting, forward, backward
    updates: list[float]  # seconds of all of Muon's directions; 0 in SGD
    pixels: int  # height and width of the images
    rest: list[float] = field(default_factory=list)  # seconds of a plain step; empty in former checkpoints

    @property
    def plain(self) -> list[float]:
        """Seconds of a plain step of the optimiser, 0.0 where nobody has measured it."""
        return self.rest or [0.0] * len(self.micro_batch)

    def busy(self, counts: Sequence[int]) -> list[float]:
        """Seconds of each rank's step with so many micro-batches and its exchange, Muon's directions left out."""
        parts = zip(counts, self.micro_batch, self.plain, strict=True)
        return [count * each + PLAIN_STEPS * own for count, each, own in parts]

    def step(self, counts: Sequence[int]) -> float:
        """Seconds of a step, the wire left out: Muon's directions follow when the last rank has its gradients."""
        return max(self.busy(counts)) + self._directions()

    def least(self, micro_batches: int) -> float:
        """As `step`, if micro-batches could be cut anywhere."""
        rates = [1 / each for each in self.micro_batch]
        fixed = sum(rate * own for rate, own in zip(rates, self.busy([0] * len(rates)), strict=True))
        return (micro_batches + fixed) / sum(rates) + self._directions()

    def _directions(self) -> float:
        """Seconds of Muon's directions, each rank with as many of them as it is fast."""
        return 1 / sum(1 / each for each in self.updates) if all(self.updates) else 0.0

    def alone(self, nodes: list[list[int]], micro_batches: int, global_batch: int) -> list[float]:
        """Images a second of each node, if it trained alone."""
        steps = [
            micro_batches * own + updates + plain
            for own, updates, plain in zip(self.micro_batch, self.updates, self.plain, strict=True)
        ]
        return [global_batch * len(ranks) ** 2 / sum(steps[rank] for rank in ranks) for ranks in nodes]

    def now(self, seconds: list[float]) -> Speeds:
        """As training has shown them since: a micro-batch's `seconds` by rank, of whatever resolution.

        The fastest rank is taken to be as fast as it was, and a slower one to be slower in all that it does.
        """
        fastest = seconds.index(min(seconds))
        scale = self.micro_batch[fastest] / seconds[fastest]
        times = [scale * now / then for now, then in zip(seconds, self.micro_batch, strict=True)]
        parts = (self.micro_batch, self.updates, self.plain)
        own, updates, rest = ([by * each for by, each in zip(times, part, strict=True)] for part in parts)
        return Speeds(own, updates, self.pixels, rest)


@dataclass(frozen=True)
class Shares:
    """A division of `sum(counts)` micro-batches among `len(counts)` ranks."""

    counts: list[int]
    speeds: Speeds | None = None  # as measured when the ranks met; None where nobody asked

    @property
    def mean(self) -> float:
        """Micro-batches of a rank, on average.

        Each micro-batch's loss is divided by it: the mean over the ranks of their summed gradients is then the mean
        over the micro-batches. With equal shares it is a rank's number of them, exactly.
        """
        return sum(self.counts) / len(self.counts)

    def weight(self, rank: int) -> float:
        """How much this rank's running statistics count in the mean over the ranks; with equal shares 1.0, exactly."""
        return self.counts[rank] / self.mean

    @property
    def relative(self) -> list[float]:
        """Speeds of the ranks, the slowest 1.0; all 1.0 where they differ by no more than noise does."""
        seconds = self.speeds.micro_batch if self.speeds else [1.0] * len(self.counts)
        if max(seconds) < GAIN * min(seconds):
            return [1.0] * len(seconds)
        return [max(seconds) / each for each in seconds]

    def saved(self) -> dict[str, Any]:
        """For a checkpoint."""
        return asdict(self)

    @classmethod
    def from_saved(cls, saved: dict[str, Any] | None, micro_batches: int, ranks: int) -> Shares:
        """From a checkpoint of so many ranks; one that says nothing is of a release in which all shares were equal."""
        if saved is None:
            return cls(equal(micro_batches, ranks))
        return cls(list(saved["counts"]), saved["speeds"] and Speeds(**saved["speeds"]))

    @property
    def short(self) -> str:
        """The ranks' micro-batches alone."""
        if len(self.counts) > MANY:
            return f"{min(self.counts)} to {max(self.counts)}"
        return " + ".join(map(str, self.counts))

    def __str__(self) -> str:
        return f"{self.short} of {sum(self.counts)} micro-batches{' a rank' * (len(self.counts) > MANY)}"


def equal(micro_batches: int, parts: int) -> list[int]:
    """As equal as can be: the first parts (ranks, passes) have one more where it does not come out even."""
    return [micro_batches // parts + (part < micro_batches % parts) for part in range(parts)]


def divide(micro_batches: int, speeds: Speeds) -> list[int]:
    """The division with the shortest step: each rank has one, each further goes to who is soonest done with it.

    Raises ValueError where there are more ranks than micro-batches.
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
    """The division that suits these speeds, if it is clearly faster than `counts`; else `counts`."""
    best = divide(sum(counts), speeds)
    return best if speeds.step(counts) > GAIN * speeds.step(best) else counts


def beside(counts: Sequence[int], speeds: Speeds) -> list[int] | None:
    """The division with a micro-batch less for the rank that is done last, the likeliest to be better than `counts`.

    It goes to the rank that is soonest done with it. None where that rank has no more than one.
    """
    busy = speeds.busy(counts)
    last = busy.index(max(busy))
    if counts[last] == 1:
        return None
    done = speeds.busy([count + 1 for count in counts])
    first = min((rank for rank in range(len(counts)) if rank != last), key=lambda rank: done[rank])
    return [count + (rank == first) - (rank == last) for rank, count in enumerate(counts)]


def nodes(world: World) -> list[list[int]]:
    """The ranks of each machine; torchrun numbers them machine by machine, as many on each."""
    ranks = list(range(world.size))
    return [ranks[first : first + world.local_size] for first in range(0, world.size, world.local_size)]


def follows(config: Config, world: World, mode: str) -> bool:
    """Whether the shares follow the speeds; ranks of one machine are equals, and local SGD needs equal shares."""
    return config.distributed.share == "auto" and world.local_size < world.size and mode != LocalSGD.name


def choose(
    config: Config,
    world: World,
    kept: Shares | None,
    mode: str,
    measure: Callable[[], Speeds],
    timed: Callable[[Shares], float],
) -> tuple[Shares, str]:
    """How the micro-batches are divided and why, the same on all ranks; collective. No words where nothing is to say.

    Args:
        kept: what the checkpoint that is resumed says of it, if that is of this world size.
        mode: of modes.KINDS.
        measure: what each rank needs alone; called where there are several machines, and `kept` does not say.
        timed: seconds of a whole step with such shares, the same on all ranks; called where unequal ones promise to be
            faster: what an exchange takes of a slow processor can't be told from what it computes alone.
    """
    micro_batches, one_machine = config.micro_batches, world.local_size == world.size
    even = equal(micro_batches, world.size)
    if one_machine:
        shares, why = Shares(even), "all ranks are on one machine"
    elif kept and sum(kept.counts) == micro_batches and (follows(config, world, mode) or kept.counts == even):
        shares, why = Shares(kept.counts, kept.speeds or measure()), "as in the checkpoint"
    else:
        speeds = measure()
        shares, why = Shares(even, speeds), "as distributed.share says"
        if follows(config, world, mode):
            shares = Shares(better(even, speeds), speeds)
            why = "no other division is clearly faster"
            if shares.counts != even:
                shares, why = _tried(shares, speeds, timed)
            if speeds.step(shares.counts) > 1.25 * speeds.least(micro_batches):
                why += "; a smaller micro_batch would let the faster one take more"
        elif mode == LocalSGD.name:
            why = "local SGD takes equal shares"
    if one_machine and shares.counts == even and micro_batches % world.size == 0:
        return shares, ""
    return shares, "; ".join(filter(None, [f"shares: {shares}", why, slow(shares.speeds, world)]))


def _tried(promised: Shares, speeds: Speeds, timed: Callable[[Shares], float]) -> tuple[Shares, str]:
    """The better of the division that the speeds promise and the one beside it, by whole steps of both; and why."""
    other = beside(promised.counts, speeds)
    if other is None:
        return promised, "by speed"
    found = [(timed(each), each) for each in (promised, Shares(other, speeds))]
    found.sort(key=lambda pair: pair[0])
    (seconds, best), (more, second) = found
    return best, f"by speed and by trial: {seconds:.2f} s a step, with {second.short} {more:.2f} s"


def slow(speeds: Speeds | None, world: World) -> str:
    """The slowest of several machines in words; empty where they are about equal, or nothing is known."""
    if speeds is None or world.local_size == world.size:
        return ""
    seconds = [sum(speeds.micro_batch[rank] for rank in ranks) / len(ranks) for ranks in nodes(world)]
    slowest, fastest = seconds.index(max(seconds)), seconds.index(min(seconds))
    times = seconds[slowest] / seconds[fastest]
    if times < GAIN:
        return f"a micro-batch takes each node {seconds[fastest]:.2g} s"
    return (
        f"node {slowest} takes {times:.1f} times as long as node {fastest} for a micro-batch "
        f"({seconds[slowest]:.2g} and {seconds[fastest]:.2g} s)"
    )
