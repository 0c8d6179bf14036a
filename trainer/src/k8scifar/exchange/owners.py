"""Owners: each matrix is one rank's, which alone gets its gradients, steps, and tells the others what came of it.

A rank sends each gradient once and each result to every other rank: with two ranks half of what an all-reduce
sends for the gradients. Sums are taken in float32, in the order of the ranks, so at two ranks they are those of an
all-reduce, bit for bit. What no rank owns (norms, biases, small matrices) travels with the gradients, exactly, and
every rank adds it up by itself.
"""

# No `from __future__ import annotations`: DistributedDataParallel reads a hook's annotations, not their text.
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import nn

from k8scifar.exchange.formats import Float32, padded
from k8scifar.ranks.agree import unflatten
from k8scifar.ranks.world import World

ROUNDS = 4  # messages in which a rank sends its results: each travels while the next is computed
PER_NUMBER = 5000.0  # operations that a core does while a number goes to its owner and back, at 1 Gb/s


def divide(costs: Sequence[float], sizes: Sequence[int], speeds: Sequence[float]) -> list[int]:
    """The owner of each matrix: the dearest first, each to the rank that is soonest done with computing and receiving.

    Args:
        costs: floating point operations of each matrix's step.
        sizes: numbers in each matrix.
        speeds: of the ranks in computing, in any unit, about 1; all have the same wire.
    """
    busy, owners = [(0.0, 0.0)] * len(speeds), [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda index: -(costs[index] + PER_NUMBER * sizes[index])):
        with_it = [(work + costs[index], load + PER_NUMBER * sizes[index]) for work, load in busy]
        done = [work / speed + load for (work, load), speed in zip(with_it, speeds, strict=True)]
        owners[index] = done.index(min(done))
        busy[owners[index]] = with_it[owners[index]]
    return owners


def stored(tensor: torch.Tensor) -> torch.Tensor:
    """A dense tensor's values in the order in which memory holds them, [n]: a view, whatever the memory format."""
    return tensor.as_strided((tensor.numel(),), (1,), tensor.storage_offset())


def rows(tensor: torch.Tensor) -> torch.Tensor:
    """A dense weight or its gradient as a matrix [out, n], each row in the order in which memory holds it: a view."""
    return stored(tensor).view(len(tensor), -1)


@dataclass
class _Message:
    """The gradients of one bucket, on their way."""

    received: torch.Tensor  # uint8: of each other rank, in order, what it has for this one
    work: dist.Work
    pieces: list[tuple[nn.Parameter, int, int]]  # of what this rank receives: the parameter, begin and end of its bytes
    length: int  # bytes from each other rank


@dataclass(frozen=True)
class Formats:
    """How gradients go to their owners, and results come back."""

    there: Float32
    back: Float32
    rest_there: dict[nn.Parameter, torch.Tensor] = field(default_factory=dict)  # bfloat16 [out, n], if it rounds
    rest_back: dict[nn.Parameter, torch.Tensor] = field(default_factory=dict)  # the same; an owner's alone counts


class Owners:
    """The exchange of gradients and results by their owners.

    Args:
        matrices: that have owners, in any order that all ranks have alike.
        costs: of each, relative work of its step.
        owners: a rank for each.
        mark: of the step's clock.
    """

    def __init__(
        self,
        world: World,
        matrices: list[nn.Parameter],
        costs: Sequence[float],
        owners: list[int],
        formats: Formats,
        mark: Callable[[str], None],
    ) -> None:
        self._world, self._formats, self._mark = world, formats, mark
        self.owner = dict(zip(matrices, owners, strict=True))
        self._share = 1 / world.size
        self._others = [rank for rank in range(world.size) if rank != world.rank]
        self._coming: dict[nn.Parameter, _Message] = {}  # owned here, its gradients not yet added up
        self._messages: list[_Message] = []
        self._taken: set[nn.Parameter] = set()  # owned here, and no remainder of this rank's own is left of them
        self._rounds = _rounds(matrices, costs, owners, world.size)

    @torch.no_grad()
    def send(self, _: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        """A hook for DistributedDataParallel: send a bucket's gradients to their owners, beside the backward pass."""
        buffer, world, at = bucket.buffer(), self._world, 0
        gradients, pieces = {}, [[] for _ in range(world.size)]  # for each rank: the parameter, begin and end in bytes
        length = [0] * world.size  # bytes to each rank
        for parameter in bucket.parameters():
            gradients[parameter] = buffer[at : at + parameter.numel()]
            at += parameter.numel()
            size = 4 * parameter.numel()
            if parameter in self.owner:
                size = self._formats.there.size(*rows(parameter).shape)
            else:
                gradients[parameter].mul_(self._share)
            for rank in [self.owner[parameter]] if parameter in self.owner else range(world.size):
                pieces[rank].append((parameter, length[rank], length[rank] + size))
                length[rank] += padded(size)
        out = self._bytes(sum(length) - length[world.rank])
        begin = 0
        for rank in self._others:
            for parameter, first, last in pieces[rank]:
                self._write(parameter, gradients[parameter], out[begin + first : begin + last])
            begin += length[rank]
        received = self._bytes(length[world.rank] * len(self._others))
        mine = length[world.rank]
        work = self._swap(out, received, length, [mine] * world.size)
        message = _Message(received, work, pieces[world.rank], mine)
        self._messages.append(message)
        self._coming |= {parameter: message for parameter, *_ in message.pieces}
        done = torch.futures.Future(devices=[world.device] if world.device.type == "cuda" else None)
        done.set_result(buffer)  # the other ranks' gradients follow in `settle`
        return done

    def _write(self, parameter: nn.Parameter, gradient: torch.Tensor, out: torch.Tensor) -> None:
        if parameter in self.owner:
            rest = self._formats.rest_there.get(parameter)
            self._formats.there.write(gradient.view(len(parameter), -1), self._share, rest, out)
        else:
            out.view(torch.float32).copy_(gradient)

    def _bytes(self, size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.uint8, device=self._world.device)

    def _swap(self, out: torch.Tensor, received: torch.Tensor, there: list[int], here: list[int]) -> dist.Work:
        """Start sending `there` bytes to each other rank and receiving `here` from it (by rank; none for this one)."""
        sizes = [[size * (rank != self._world.rank) for rank, size in enumerate(way)] for way in (here, there)]
        return dist.all_to_all_single(received, out, *sizes, async_op=True)

    @torch.no_grad()
    def settle(self, parameters: Sequence[nn.Parameter] | None = None) -> None:
        """Put the means over the ranks in the gradients of these parameters, if they are this rank's or nobody's.

        None: of all that have been sent. Waits for the messages.
        """
        for parameter in [*self._coming] if parameters is None else parameters:
            if message := self._coming.pop(parameter, None):
                message.work.wait()
                self._sum(parameter, message)
        if not self._coming:
            for message in self._messages:  # also those that brought nothing
                message.work.wait()
            self._messages.clear()

    def _sum(self, parameter: nn.Parameter, message: _Message) -> None:
        """Add the other ranks' gradients to this one's, in the order of the ranks."""
        first, last = next((first, last) for piece, first, last in message.pieces if piece is parameter)
        own = rows(parameter.grad) if parameter in self.owner else stored(parameter.grad).view(1, -1)
        form = self._formats.there if parameter in self.owner else Float32()
        if parameter in self.owner:
            own.mul_(self._share)
            if form.rounds and parameter not in self._taken:  # what it rounded off while another was the owner
                rest = self._formats.rest_there[parameter]
                own.add_(rest, alpha=self._share)
                rest.zero_()
                self._taken.add(parameter)
        sent = [message.received[at * message.length :][first:last] for at in range(len(self._others))]
        before = sent[: self._world.rank]
        if before:
            total = torch.empty_like(own)
            form.read(before[0], total)
            for piece in before[1:]:
                form.add(piece, total)
            own.add_(total)
        for piece in sent[self._world.rank :]:
            form.add(piece, own)

    @torch.no_grad()
    def spread(self, result: Callable[[nn.Parameter], torch.Tensor]) -> None:
        """Put `result` of each matrix, computed by its owner, in its gradient, on all ranks; collective.

        `result`: [out, n], the columns in the order of channels last; called once the gradient is the ranks' mean.
        """
        world, sent = self._world, []
        for parts in self._rounds:
            length = [sum(padded(size) for _, size in self._sized(part)) for part in parts]
            own = self._bytes(length[world.rank])
            for parameter, piece in self._pieces(parts[world.rank], own):
                if parameter in self._coming:
                    self._mark("communication")
                    self.settle([parameter])
                    self._mark("updates")
                self._formats.back.write(result(parameter), 1.0, self._formats.rest_back.get(parameter), piece)
            received = self._bytes(sum(length) - length[world.rank])
            world.pulse.arrive()
            work = self._swap(own.repeat(len(self._others)), received, [length[world.rank]] * world.size, length)
            sent.append((parts, [own, *received.split([length[rank] for rank in self._others])], work))
        self._mark("communication")
        self.settle()
        for parts, contents, work in sent:
            self._mark("communication")
            work.wait()
            self._mark("updates")
            for rank, content in zip([world.rank, *self._others], contents, strict=True):
                for parameter, piece in self._pieces(parts[rank], content):
                    self._read(piece, parameter.grad)

    def _sized(self, part: list[nn.Parameter]) -> Iterator[tuple[nn.Parameter, int]]:
        """Each parameter with the bytes of its result."""
        for parameter in part:
            yield parameter, self._formats.back.size(*rows(parameter).shape)

    def _pieces(self, part: list[nn.Parameter], content: torch.Tensor) -> Iterator[tuple[nn.Parameter, torch.Tensor]]:
        """Each parameter with its place in a message."""
        at = 0
        for parameter, size in self._sized(part):
            yield parameter, content[at : at + size]
            at += padded(size)

    def _read(self, sent: torch.Tensor, gradient: torch.Tensor) -> None:
        """Put what an owner sent in a gradient, the columns of its matrix in the order of channels last."""
        last = gradient.movedim(1, -1)
        if last.is_contiguous():
            self._formats.back.read(sent, last.view(len(last), -1))
            return
        values = torch.empty(len(last), last[0].numel(), device=last.device)
        self._formats.back.read(sent, values)
        last.copy_(values.view_as(last))


def move(world: World, tensors: list[torch.Tensor], sources: list[int], targets: list[set[int]]) -> None:
    """Copy each tensor (dense) from its source rank to its target ranks, in place; collective.

    Source, target and form of each are the same on all ranks.
    """
    every = list(zip([stored(tensor).view(torch.uint8) for tensor in tensors], sources, targets, strict=True))
    ranks, me = range(world.size), world.rank
    there = [[values for values, source, target in every if source == me != rank and rank in target] for rank in ranks]
    here = [[values for values, source, target in every if source == rank != me and me in target] for rank in ranks]
    outgoing, incoming = ([sum(map(torch.numel, parts)) for parts in way] for way in (there, here))
    out = torch.cat([torch.empty(0, dtype=torch.uint8, device=world.device), *itertools.chain(*there)])
    received = torch.empty(sum(incoming), dtype=torch.uint8, device=world.device)
    world.pulse.arrive()
    dist.all_to_all_single(received, out, incoming, outgoing)
    unflatten(received, list(itertools.chain(*here)))


def _rounds(
    matrices: list[nn.Parameter], costs: Sequence[float], owners: list[int], ranks: int
) -> list[list[list[nn.Parameter]]]:
    """Each rank's matrices in ROUNDS parts of about equal work, the last layer first, as the backward pass has them."""
    divided: list[list[list[nn.Parameter]]] = [[[] for _ in range(ranks)] for _ in range(ROUNDS)]
    whole = [sum(cost for cost, owner in zip(costs, owners, strict=True) if owner == rank) for rank in range(ranks)]
    done = [0.0] * ranks
    for parameter, cost, owner in reversed(list(zip(matrices, costs, owners, strict=True))):
        part = min(int(ROUNDS * done[owner] / whole[owner]), ROUNDS - 1) if whole[owner] else 0
        divided[part][owner].append(parameter)
        done[owner] += cost
    return divided
