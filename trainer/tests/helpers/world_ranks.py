"""One rank of test_world_size.py: the first steps of trainings one after the other, to import torch only once.

Arguments: a JSON file of trainings, each {"name", "port", "arguments"}. Rank 0 writes NAME.steps: of each step the mean
gradient, the weights before it, their change, and the running statistics that an epoch's end would leave.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path

import torch
from comm_ranks import whole

from k8scifar.cli import main
from k8scifar.ranks.agree import average
from k8scifar.training import loop

STEPS = 2


class Done(Exception):
    """The steps are done."""


def kept(update, found):
    """`update` of the loop, whose steps are added to `found`."""

    def wrapper(session):
        state, world = session.state, session.world
        if state.step == STEPS:
            raise Done
        owners = getattr(state.exchange, "owners", None)
        if owners:
            owners.finish()
        weights = list(state.net.parameters())
        gradient = flat([whole(weight, owners) for weight in weights])
        statistics = [tensor.clone() for tensor in state.statistics.running()]
        average(statistics, world, weight=state.shares.weight(world.rank))
        before = flat(weights)
        update(session)
        change = flat(weights) - before
        found.append({"gradient": gradient, "weights": before, "change": change, "statistics": flat(statistics)})

    return wrapper


def flat(tensors) -> torch.Tensor:
    """Every seventh value of the tensors: all would be 2 GB of files, and seven divides no size of theirs."""
    return torch.cat([tensor.detach().flatten() for tensor in tensors])[::7].clone()


def run(plan: Path) -> int:
    """This rank's part of every training."""
    update = loop.update
    for training in json.loads(plan.read_text()):
        os.environ["MASTER_PORT"] = str(training["port"])
        found = []
        loop.update = kept(update, found)
        with contextlib.suppress(Done):
            return main(["train", *training["arguments"]]) or 1
        if os.environ["RANK"] == "0":
            torch.save(found, plan.with_name(f"{training['name']}.steps"))
    return 0


if __name__ == "__main__":
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
    sys.exit(run(Path(sys.argv[1])))
