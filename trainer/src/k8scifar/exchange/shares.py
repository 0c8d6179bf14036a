"""Shares: the micro-batches of a global batch, divided among the ranks by their speeds.

A division only decides the order in which gradients are added. The checkpoint holds it nevertheless: a run that resumes
at the same world size keeps it, so that it equals an uninterrupted one bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from k8scifar.config.schema import Config
from k8scifar.exchange.cost_model import GAIN, Speeds, better, neighbour
from k8scifar.exchange.local_sgd import LocalSGD
from k8scifar.ranks.world import World

MANY = 8  # the log lists the shares of at most so many ranks
COARSE = 1.25  # times the least possible step: beyond that, smaller micro-batches would divide the work better


@dataclass(frozen=True)
class Shares:
    """A division of `sum(counts)` micro-batches among `len(counts)` ranks."""

    counts: list[int]
    speeds: Speeds | None = None  # as measured when the ranks met; None if they were not measured

    @property
    def mean(self) -> float:
        """Micro-batches of a rank, on average.

        Each micro-batch's loss is divided by it: the mean over the ranks of their summed gradients is then the mean
        over the micro-batches. With equal shares it equals a rank's count exactly.
        """
        return sum(self.counts) / len(self.counts)

    def weight(self, rank: int) -> float:
        """The weight of this rank's running statistics in the mean over the ranks; exactly 1.0 with equal shares."""
        return self.counts[rank] / self.mean

    @property
    def relative(self) -> list[float]:
        """Speeds of the ranks, the slowest 1.0; all 1.0 if they differ by no more than noise does."""
        seconds = self.speeds.micro_batch if self.speeds else [1.0] * len(self.counts)
        if max(seconds) < GAIN * min(seconds):
            return [1.0] * len(seconds)
        return [max(seconds) / each for each in seconds]

    def saved(self) -> dict[str, Any]:
        """For a checkpoint."""
        return asdict(self)

    @classmethod
    def from_saved(cls, saved: dict[str, Any] | None, micro_batches: int, ranks: int) -> Shares:
        """From a checkpoint of so many ranks; None is of a release in which all shares were equal."""
        if saved is None:
            return cls(equal(micro_batches, ranks))
        return cls(list(saved["counts"]), saved["speeds"] and Speeds(**saved["speeds"]))

    def described(self, world: World) -> str:
        """The division for the log: "node 0 computes 5 of 6 micro-batches and node 1 computes 1"."""
        one, least, most = "node" if world.local_size == 1 else "rank", min(self.counts), max(self.counts)
        if least == most or len(self.counts) > MANY:
            range_ = f"{least}" if least == most else f"{least} to {most}"
            return f"each of {len(self.counts)} {one}s computes {range_} of {sum(self.counts)} micro-batches"
        first, *others = [f"{one} {rank} computes {count}" for rank, count in enumerate(self.counts)]
        first += f" of {sum(self.counts)} micro-batches"
        return f"{', '.join([first, *others[:-1]])} and {others[-1]}"


def equal(micro_batches: int, parts: int) -> list[int]:
    """Divide as equally as possible; the first parts (ranks, passes) get one more if there is a remainder."""
    return [micro_batches // parts + (part < micro_batches % parts) for part in range(parts)]


def nodes(world: World) -> list[list[int]]:
    """The ranks of each machine; torchrun numbers them machine by machine, equally many on each."""
    ranks = list(range(world.size))
    return [ranks[first : first + world.local_size] for first in range(0, world.size, world.local_size)]


def follows(config: Config, world: World, mode: str) -> bool:
    """Whether the shares follow the speeds; not among ranks of one machine, nor in local SGD."""
    return config.distributed.share == "auto" and world.local_size < world.size and mode != LocalSGD.name


def choose_shares(
    config: Config,
    world: World,
    kept: Shares | None,
    mode: str,
    measure: Callable[[], Speeds],
    measure_step: Callable[[Shares], float],
) -> tuple[Shares, str]:
    """Return the division and a sentence for the log ("" if it is trivial), the same on all ranks; collective.

    Args:
        kept: the division in the checkpoint that is resumed, if it is of this world size.
        mode: of modes.MODES.
        measure: the ranks' speeds; called if there are several machines and `kept` has none.
        measure_step: seconds of a whole step with such shares, the same on all ranks; called if an unequal division
            promises a faster step, because the cost model does not know what an exchange takes from a slow processor.
    """
    micro_batches, one_machine = config.micro_batches, world.local_size == world.size
    even, timing = equal(micro_batches, world.size), ""
    if one_machine:
        shares, why = Shares(even), "because all ranks are on one machine"
    elif kept and sum(kept.counts) == micro_batches and (follows(config, world, mode) or kept.counts == even):
        shares, why = Shares(kept.counts, kept.speeds or measure()), "as in the checkpoint"
    elif mode == LocalSGD.name:
        shares, why = Shares(even, measure()), "because local SGD needs equal shares"
    elif not follows(config, world, mode):
        shares, why = Shares(even, measure()), "because distributed.share=equal"
    else:
        speeds = measure()
        shares, why = Shares(better(even, speeds), speeds), ""
        if shares.counts != even:
            shares, timing = _tried(shares, speeds, measure_step)
        if shares.counts == even:
            why = "because no other division is clearly faster"
        if speeds.step(shares.counts) > COARSE * speeds.least(micro_batches):
            timing += "; a smaller micro_batch would let the faster node take more"
    if one_machine and micro_batches % world.size == 0:
        return shares, ""
    return shares, sentence(shares, world, why, timing)


def sentence(shares: Shares, world: World, why: str = "", timing: str = "") -> str:
    """A division for the log, with the reason for it; without one, the reason is the ranks' speeds."""
    difference = _difference(shares.speeds, world)
    if not why:
        return f"{shares.described(world)}, because {difference}{timing}"
    return "; ".join(filter(None, [f"{shares.described(world)}, {why}{timing}", difference]))


def _tried(promised: Shares, speeds: Speeds, measure_step: Callable[[Shares], float]) -> tuple[Shares, str]:
    """Time whole steps of the promised division and of its neighbour; return the faster one, and both times."""
    other = neighbour(promised.counts, speeds)
    if other is None:
        return promised, ""
    found = [(measure_step(each), each) for each in (promised, Shares(other, speeds))]
    found.sort(key=lambda pair: pair[0])
    (seconds, best), (more, second) = found
    counts = second.counts
    short = " + ".join(map(str, counts)) if len(counts) <= MANY else f"{min(counts)} to {max(counts)}"
    return best, f": {seconds:.2f} s a step ({short}: {more:.2f} s)"


def _difference(speeds: Speeds | None, world: World) -> str:
    """Compare the slowest machine with the fastest, for the log; "" with one machine or without a measurement."""
    if speeds is None or world.local_size == world.size:
        return ""
    seconds = [sum(speeds.micro_batch[rank] for rank in ranks) / len(ranks) for ranks in nodes(world)]
    slowest, fastest = seconds.index(max(seconds)), seconds.index(min(seconds))
    times = seconds[slowest] / seconds[fastest]
    if times < GAIN:
        return f"a micro-batch takes {seconds[fastest]:.2g} s on each node"
    return (
        f"node {slowest} is {times:.1f} times slower than node {fastest} "
        f"({seconds[slowest]:.2g} and {seconds[fastest]:.2g} s a micro-batch)"
    )
