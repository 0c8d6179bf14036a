"""Each weight matrix has one owner: only that rank receives its gradients, computes the update and broadcasts it.

A rank sends each gradient once, and each result to every other rank. Two ranks send half of an all-reduce's bytes for
the gradients. Sums are taken in float32 in the order of the ranks; at two ranks they equal an all-reduce's bit for bit.
Parameters without an owner (norms, biases, small matrices) travel with the gradients in float32, and every rank adds
them up.
"""

# No `from __future__ import annotations`: DistributedDataParallel reads a hook's annotations, not their text.
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import nn

from k8scifar.exchange.formats import Float32
from k8scifar.exchange.layout import Layout, rows, stored
from k8scifar.ranks.agree import unflatten
from k8scifar.ranks.world import World

ROUNDS = 4  # messages in which a rank sends its results; each travels while the next is computed


@dataclass
class _Message:
    """The gradients of one bucket, in flight."""

    layout: Layout
    received: torch.Tensor  # uint8 [other ranks, bytes]: what each of them sends to this rank
    work: dist.Work


@dataclass(frozen=True)
class Formats:
    """The formats of gradients on the way to their owners, and of results on the way back, with their remainders."""

    there: Float32
    back: Float32
    rest_there: dict[nn.Parameter, torch.Tensor] = field(default_factory=dict)  # bfloat16 [out, n], if `there` rounds
    rest_back: dict[nn.Parameter, torch.Tensor] = field(default_factory=dict)  # if `back` rounds; owners use it


class Owners:
    """Exchange gradients and results through the owners of the matrices.

    Args:
        matrices: those that have owners, in the same order on all ranks.
        costs: of each, relative work of its update.
        owners: of each, a rank.
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
        self._weight = 1 / world.size  # of one rank's gradient in the mean
        self._others = [rank for rank in range(world.size) if rank != world.rank]
        self._in_flight: dict[nn.Parameter, _Message] = {}  # this rank receives these gradients, not yet added up
        self._messages: list[_Message] = []
        self._added: set[nn.Parameter] = set()  # owned here; this rank's former remainder is in the gradient already
        self._buckets: dict[tuple[int, ...], Layout] = {}  # by the ids of a bucket's parameters
        self._rounds = _rounds(matrices, costs, owners, formats.back, world.size)

    @torch.no_grad()
    def send(self, _: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        """A hook for DistributedDataParallel: start sending a bucket's gradients, while the backward pass still runs.

        The other ranks' gradients are added later, by `finish`.
        """
        buffer, parameters, world = bucket.buffer(), bucket.parameters(), self._world
        layout = self._layout(parameters)
        mine = layout.lengths[world.rank]
        gradients = dict(zip(parameters, buffer.split([each.numel() for each in parameters]), strict=True))
        for parameter, gradient in gradients.items():
            if parameter not in self.owner:
                gradient.mul_(self._weight)
        out = self._bytes(sum(layout.lengths) - mine)
        for rank, message in zip(self._others, self._split(out, layout), strict=True):
            for parameter, place in layout.places[rank].items():
                self._write(parameter, gradients[parameter], message[place])
        received = self._bytes(mine * len(self._others))
        work = self._swap(out, received, layout.lengths, [mine] * world.size)
        message = _Message(layout, received.view(len(self._others), mine), work)
        self._messages.append(message)
        self._in_flight |= dict.fromkeys(layout.places[world.rank], message)
        done = torch.futures.Future(devices=[world.device] if world.device.type == "cuda" else None)
        done.set_result(buffer)
        return done

    def _layout(self, parameters: list[nn.Parameter]) -> Layout:
        """The layout of a bucket, built at its first step: a gradient goes to its owner, or without one to all."""
        key = tuple(map(id, parameters))
        if key not in self._buckets:
            layout = self._buckets[key] = Layout(self._world.size)
            for parameter in parameters:
                if parameter in self.owner:
                    layout.add(self.owner[parameter], parameter, self._formats.there.size(*rows(parameter).shape))
                    continue
                for rank in range(self._world.size):
                    layout.add(rank, parameter, Float32().size(1, parameter.numel()))
        return self._buckets[key]

    def _write(self, parameter: nn.Parameter, gradient: torch.Tensor, out: torch.Tensor) -> None:
        if parameter in self.owner:
            rest = self._formats.rest_there.get(parameter)
            self._formats.there.write(gradient.view(len(parameter), -1), self._weight, rest, out)
        else:
            out.view(torch.float32).copy_(gradient)

    def _bytes(self, size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.uint8, device=self._world.device)

    def _split(self, content: torch.Tensor, layout: Layout) -> Sequence[torch.Tensor]:
        """The messages of the other ranks, which are stored one after the other."""
        return content.split([layout.lengths[rank] for rank in self._others])

    def _swap(self, out: torch.Tensor, received: torch.Tensor, there: list[int], here: list[int]) -> dist.Work:
        """Start sending `there` bytes to each other rank and receiving `here` bytes from it (lists by rank)."""
        sizes = [[size * (rank != self._world.rank) for rank, size in enumerate(way)] for way in (here, there)]
        return dist.all_to_all_single(received, out, *sizes, async_op=True)

    @torch.no_grad()
    def finish(self, parameters: Sequence[nn.Parameter] | None = None) -> None:
        """Wait for the messages with these parameters' gradients and replace the gradients by their means.

        None: the gradients of all parameters. A gradient changes only on its owner or, without an owner, on all ranks.
        """
        for parameter in [*self._in_flight] if parameters is None else parameters:
            if message := self._in_flight.pop(parameter, None):
                message.work.wait()
                self._sum(parameter, message)
        if not self._in_flight:
            for message in self._messages:  # some have nothing for this rank
                message.work.wait()
            self._messages.clear()

    def _sum(self, parameter: nn.Parameter, message: _Message) -> None:
        """Add the other ranks' gradients to this rank's, in the order of the ranks."""
        place = message.layout.places[self._world.rank][parameter]
        own = rows(parameter.grad) if parameter in self.owner else stored(parameter.grad).view(1, -1)
        form = self._formats.there if parameter in self.owner else Float32()
        if parameter in self.owner:
            own.mul_(self._weight)
            if form.rounds and parameter not in self._added:  # rounded off while another rank was the owner
                rest = self._formats.rest_there[parameter]
                own.add_(rest, alpha=self._weight)
                rest.zero_()
                self._added.add(parameter)
        sent = [part[place] for part in message.received]
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
        """Compute `result` of each matrix on its owner and put it in the gradient on all ranks; collective.

        `result` returns [out, n], the columns in the order of channels last, from the ranks' mean gradient.
        """
        rank, sent = self._world.rank, []
        for layout in self._rounds:
            own = self._bytes(layout.lengths[rank])
            for parameter, place in layout.places[rank].items():
                if parameter in self._in_flight:
                    self._mark("communication")
                    self.finish([parameter])
                    self._mark("updates")
                self._formats.back.write(result(parameter), 1.0, self._formats.rest_back.get(parameter), own[place])
            received = self._bytes(sum(layout.lengths) - layout.lengths[rank])
            self._world.heartbeats.arrive()
            lengths = [layout.lengths[rank]] * self._world.size
            work = self._swap(own.repeat(len(self._others)), received, lengths, layout.lengths)
            sent.append((layout, own, received, work))
        self._mark("communication")
        self.finish()
        for layout, own, received, work in sent:
            self._mark("communication")
            work.wait()
            self._mark("updates")
            for source, content in zip([rank, *self._others], [own, *self._split(received, layout)], strict=True):
                for parameter, place in layout.places[source].items():
                    self._read(content[place], parameter.grad)

    def _read(self, sent: torch.Tensor, gradient: torch.Tensor) -> None:
        """Copy an owner's result, its columns in the order of channels last, into a gradient."""
        last = gradient.movedim(1, -1)
        if last.is_contiguous():
            self._formats.back.read(sent, last.view(len(last), -1))
            return
        values = torch.empty(len(last), last[0].numel(), device=last.device)
        self._formats.back.read(sent, values)
        last.copy_(values.view_as(last))


def move(world: World, tensors: list[torch.Tensor], sources: list[int], targets: list[set[int]]) -> None:
    """Copy each tensor (dense) from its source rank to its target ranks, in place; collective.

    All ranks pass the same sources, targets and shapes.
    """
    held = list(zip([stored(tensor).view(torch.uint8) for tensor in tensors], sources, targets, strict=True))
    ranks, me = range(world.size), world.rank
    there = [[values for values, source, target in held if source == me != rank and rank in target] for rank in ranks]
    here = [[values for values, source, target in held if source == rank != me and me in target] for rank in ranks]
    outgoing, incoming = ([sum(map(torch.numel, parts)) for parts in way] for way in (there, here))
    out = torch.cat([torch.empty(0, dtype=torch.uint8, device=world.device), *itertools.chain(*there)])
    received = torch.empty(sum(incoming), dtype=torch.uint8, device=world.device)
    world.heartbeats.arrive()
    dist.all_to_all_single(received, out, incoming, outgoing)
    unflatten(received, list(itertools.chain(*here)))


def _rounds(
    matrices: list[nn.Parameter], costs: Sequence[float], owners: list[int], form: Float32, ranks: int
) -> list[Layout]:
    """Divide each rank's results into ROUNDS messages of about equal work, in the order of the backward pass."""
    layouts = [Layout(ranks) for _ in range(ROUNDS)]
    whole = [sum(cost for cost, owner in zip(costs, owners, strict=True) if owner == rank) for rank in range(ranks)]
    done = [0.0] * ranks
    for parameter, cost, owner in reversed(list(zip(matrices, costs, owners, strict=True))):
        part = min(int(ROUNDS * done[owner] / whole[owner]), ROUNDS - 1) if whole[owner] else 0
        layouts[part].add(owner, parameter, form.size(*rows(parameter).shape))
        done[owner] += cost
    return layouts
