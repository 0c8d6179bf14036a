"""What a mode of communication is, and what an optimiser must offer whose work the ranks divide."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn


@runtime_checkable
class DividesUpdates(Protocol):
    """An optimiser whose updates of some matrices can be computed on different ranks (Muon)."""

    @property
    def hidden(self) -> list[nn.Parameter]: ...

    def cost(self, parameter: nn.Parameter) -> float: ...

    def direction(self, parameter: nn.Parameter, rehearsal: bool = False) -> torch.Tensor: ...

    def compute_directions_by(self, compute: Callable[[], None] | None) -> None: ...

    def rehearse(self) -> None: ...


@dataclass(frozen=True)
class Carried:
    """What a mode carries from one step to the next: views of its tensors."""

    shared: list[torch.Tensor] = field(default_factory=list)  # equal on all ranks
    own: list[torch.Tensor] = field(default_factory=list)  # different on each rank; all of one type
    settings: dict[str, Any] = field(default_factory=dict)


class Exchange:
    """How the ranks combine what they learned: the base of every mode, which does nothing.

    A mode overrides the methods in which it does something, and inherits from no other mode. Whatever the mode, the
    ranks' weights are bit-identical at the end of every epoch; in all modes but local SGD, after every step.
    """

    name: str  # a value of distributed.comm
    label: str  # the mode and its setting, for the log
    model: nn.Module  # the loop calls it; outside `ddp.no_sync()` its backward pass may start the exchange
    equal = True  # whether all ranks hold equal weights now
    equal_steps = True  # whether all ranks take equal steps, and so hold equal momenta, except those of `owned`
    owned: frozenset[nn.Parameter] = frozenset()  # only the owner holds the momentum of these
    at_once = False  # whether `after_backward` must leave complete gradients; else they may arrive until they are used
    mark: Callable[[str], None] = staticmethod(lambda part: None)  # of the step's clock

    def divide_updates(self, speeds: Sequence[float]) -> None:
        """Divide the optimiser's work among the ranks by their speeds; collective, at an epoch's end or the start."""

    def after_backward(self, rehearsal: bool = False) -> None:
        """Finish a step's exchange of gradients, or start the part that ends when they are used; collective.

        A rehearsal, to time the step, also computes and exchanges directions. It changes gradients and remainders.
        """

    def after_step(self, steps_in_epoch: int, epoch_ends: bool) -> None:
        """Combine the weights, if the mode does so after `steps_in_epoch` optimiser steps; collective."""

    def begin(self, equal: bool = True) -> None:
        """Start from the present weights and momenta, which are a checkpoint's.

        `equal`: False if each rank's own weights are about to be restored into `carried`.
        """

    def collect(self) -> None:
        """Copy what only owners hold to the ranks that write checkpoints; collective."""

    def carried(self) -> Carried:
        """What a resumed run needs besides weights and optimiser."""
        return Carried()
