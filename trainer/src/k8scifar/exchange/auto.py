"""Choose the mode of communication from a timing of the wire and of a step, once in a run, when the ranks meet.

The choice is part of the mathematics. A run that resumes at the same world size keeps its checkpoint's mode, however
fast the wire is then.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from k8scifar.config.schema import Config
from k8scifar.exchange.cost_model import Choice, Times, best, predict
from k8scifar.exchange.modes import MODES
from k8scifar.ranks.world import World

COST = "in a run of 200 steps, averaging every 8 of them cost one to two points of accuracy, every 4 less than one"


def choose_mode(
    config: Config, world: World, kept: dict[str, Any] | None, parameters: int, measure: Callable[[], Times]
) -> tuple[Choice, str]:
    """Return the mode and the reason for it, the same on all ranks; collective.

    Args:
        kept: `comm` of the checkpoint that is resumed, if it is of this world size.
        measure: called if neither configuration, checkpoint nor the ranks' places decide.
    """
    wanted, every = config.distributed.comm, config.distributed.local_sgd_steps
    if wanted != "auto":
        return Choice(wanted, every), "as distributed.comm says"
    if world.size == 1:
        return Choice("allreduce", every), "one rank"
    if kept and kept["mode"] in MODES:
        return Choice(kept["mode"], kept.get("every", every)), "kept from the checkpoint, not measured again"
    if world.local_size == world.size:
        return Choice("allreduce", every), "all ranks are on one machine"
    times = measure()
    steps = predict(times, every)
    if config.micro_batches % world.size:  # local SGD needs equal shares
        steps = {choice: seconds for choice, seconds in steps.items() if choice.mode != "local-sgd"}
    index = torch.tensor([list(steps).index(best(steps))])
    dist.broadcast(index, 0, group=world.host_group)
    predicted = ", ".join(f"{choice} {seconds:.3f}" for choice, seconds in steps.items())
    updates = f", Muon's directions {times.updates:.2f} s" if times.updates else ""
    why = (
        f"an all-reduce in bfloat16 ({2e-6 * parameters:.1f} MB) takes {times.movement:.2f} s, forward and backward "
        f"{times.compute:.2f} s{updates}; predicted seconds a step: {predicted}"
    )
    chosen = list(steps)[index.item()]
    return chosen, f"{why}; {COST}" if chosen.mode == "local-sgd" else why
