"""Who computes how much: the micro-batches of a global batch, divided among the ranks by their speeds.

A division decides only the order in which gradients are added up. It is kept all the same: the checkpoint holds it, and
a run that resumes at the same world size goes on with it, so that it stays equal to an uninterrupted one, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from k8scifar.config.schema import Config
from k8scifar.ranks.local_sgd import LocalSGD
from k8scifar.ranks.world import World

GAIN = 1.1  # times as fast a division must promise to be before it takes the place of the one there is: noise is less
MANY = 8  # ranks, beyond which their shares are not told one by one


@dataclass(frozen=True)
class Speeds:
    """What each rank needs alone, without its peers; lists by rank."""

    micro_batch: list[float]  # seconds: augmenting, forward, backward
    updates: list[float]  # seconds of all of Muon's directions; 0 in SGD
    pixels: int  # height and width of the images

    def alone(self, nodes: list[list[int]], micro_batches: int, global_batch: int) -> list[float]:
        """Images a second of each node, if it trained alone. SGD's own step is left out: 2 % of a step or less."""
        found = []
        for ranks in nodes:
            seconds = sum(micro_batches * self.micro_batch[rank] + self.updates[rank] for rank in ranks) / len(ranks)
            found.append(global_batch * len(ranks) / seconds)
        return found

    def now(self, seconds: list[float]) -> Speeds:
        """As training has shown them since: a micro-batch's `seconds` by rank, of whatever resolution.

        The fastest rank is taken to be as fast as it was.
        """
        fastest = seconds.index(min(seconds))
        scale = self.micro_batch[fastest] / seconds[fastest]
        return Speeds([scale * each for each in seconds], self.updates, self.pixels)


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

    def __str__(self) -> str:
        total = sum(self.counts)
        if len(self.counts) > MANY:
            return f"{min(self.counts)} to {max(self.counts)} of {total} micro-batches a rank"
        return f"{' + '.join(map(str, self.counts))} of {total} micro-batches"


def equal(micro_batches: int, ranks: int) -> list[int]:
    """As equal as can be: the first ranks have one more where it does not come out even."""
    return [micro_batches // ranks + (rank < micro_batches % ranks) for rank in range(ranks)]


def divide(micro_batches: int, seconds: Sequence[float]) -> list[int]:
    """The division whose slowest rank is done first: each has one, each further goes to who is soonest done with it.

    `seconds`: of a micro-batch, by rank. Raises ValueError where there are more ranks than micro-batches.
    """
    if micro_batches < len(seconds):
        raise ValueError(f"{len(seconds)} ranks can't share {micro_batches} micro-batches")
    counts = [1] * len(seconds)
    for _ in range(micro_batches - len(seconds)):
        done = [(count + 1) * each for count, each in zip(counts, seconds, strict=True)]
        counts[done.index(min(done))] += 1
    return counts


def duration(counts: Sequence[int], seconds: Sequence[float]) -> float:
    """Seconds until the last rank is done with its micro-batches."""
    return max(count * each for count, each in zip(counts, seconds, strict=True))


def better(counts: list[int], seconds: Sequence[float]) -> list[int]:
    """The division that suits these speeds, if it is clearly faster than `counts`; else `counts`."""
    best = divide(sum(counts), seconds)
    return best if duration(counts, seconds) > GAIN * duration(best, seconds) else counts


def nodes(world: World) -> list[list[int]]:
    """The ranks of each machine; torchrun numbers them machine by machine, as many on each."""
    ranks = list(range(world.size))
    return [ranks[first : first + world.local_size] for first in range(0, world.size, world.local_size)]


def follows(config: Config, world: World, mode: str) -> bool:
    """Whether the shares follow the speeds; ranks of one machine are equals, and local SGD needs equal shares."""
    return config.distributed.share == "auto" and world.local_size < world.size and mode != LocalSGD.name


def choose(
    config: Config, world: World, kept: Shares | None, mode: str, measure: Callable[[], Speeds]
) -> tuple[Shares, str]:
    """How the micro-batches are divided and why, the same on all ranks; collective. No words where nothing is to say.

    Args:
        kept: what the checkpoint that is resumed says of it, if that is of this world size.
        mode: of modes.KINDS.
        measure: what each rank needs alone; called where there are several machines, and `kept` does not say.
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
            shares = Shares(better(even, speeds.micro_batch), speeds)
            why = "by speed" if shares.counts != even else "no other division is clearly faster"
            best = micro_batches / sum(1 / each for each in speeds.micro_batch)  # seconds, if shares could be any
            if duration(shares.counts, speeds.micro_batch) > 1.25 * best:
                why += "; a smaller micro_batch would let the faster one take more"
        elif mode == LocalSGD.name:
            why = "local SGD takes equal shares"
    if one_machine and shares.counts == even and micro_batches % world.size == 0:
        return shares, ""
    return shares, "; ".join(filter(None, [f"shares: {shares}", why, slow(shares.speeds, world)]))


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
