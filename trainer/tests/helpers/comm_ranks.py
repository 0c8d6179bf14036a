"""One rank of runs.train_in_turn, under torchrun: several trainings one after the other, to import torch only once.

Arguments: a JSON file of trainings, each {"port", "arguments", "cut"}. With "apart" the ranks believe that each has a
host; with "slow" also, once they have measured the wire, that it is a slow one. With "speeds" (seconds of a
micro-batch by rank) each believes that it has a host, and that these were measured; "later" holds what it is to
believe at the end of each epoch, and the gradients of the first step are kept. With "cut": {"from", "to", "step"}
rank 0 first copies a finished run's folder as a crash would leave it after that step. Each rank's hash of its own
weights at the end of each epoch and of the run, and after each averaging of local SGD, is added to hashes.RANK beside
the file.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import sys
from pathlib import Path

import torch

from k8scifar.cli import main
from k8scifar.exchange import auto
from k8scifar.exchange.local_sgd import LocalSGD
from k8scifar.ranks import device
from k8scifar.ranks.agree import average
from k8scifar.ranks.device import Precision
from k8scifar.training import checkpoint, ending, epochs, loop, opening, rank_speeds


def note(parameters, label: str) -> None:
    """Write down what this rank's weights are."""
    digest = hashlib.sha256()
    for parameter in parameters:
        digest.update(parameter.detach().contiguous().numpy().tobytes())
    with open(HASHES, "a") as file:
        file.write(f"{label} {digest.hexdigest()}\n")


def noted(function):
    """`function` of a session, which also notes the weights."""

    def wrapper(session, *arguments):
        note(session.state.net.parameters(), f"{session.config.name} {session.state.step}")
        return function(session, *arguments)

    return wrapper


def noted_when_averaged(method):
    """`method` of LocalSGD, which also notes the weights afterwards, and holds them against the exact mean."""

    def wrapper(mode):
        exact = [parameter.detach().clone() for parameter in mode._parameters]
        moved = sum((weight - anchor).norm() ** 2 for weight, anchor in zip(exact, mode._anchors, strict=True)) ** 0.5
        average(exact, mode._world)
        method(mode)
        off = sum((weight - mean).norm() ** 2 for weight, mean in zip(mode._parameters, exact, strict=True)) ** 0.5
        assert off < 0.02 * moved, f"{off} of {moved}"
        note(mode._parameters, "averaged within-an-epoch")

    return wrapper


def slow(measure):
    """`measure` of wire, done for real, its outcome put aside."""

    def wrapper(*arguments):
        found = measure(*arguments)
        assert min(found.movement, found.compute) > 0.0 and list(found.exposed) == ["allreduce", "bf16", "int8"]
        return auto.Times(movement=2.0, compute=1.0, exposed={"allreduce": 4.0, "bf16": 2.0, "int8": 1.0})

    return wrapper


def told(measure, seconds):
    """`measure` of each rank alone, done for real, its outcome put aside."""

    def wrapper(trial, pixels):
        before = [tensor.clone() for tensor in trial.ddp.state_dict().values()]
        found = measure(trial, pixels)
        assert min(found.micro_batch) > 0.0 and found.pixels == pixels
        assert all(map(torch.equal, before, trial.ddp.state_dict().values())), "measuring leaves the model as it is"
        return dataclasses.replace(found, micro_batch=seconds)

    return wrapper


def as_told(timed):
    """`timed` of choice: the steps are taken, and what the told speeds promise is what they take."""

    def wrapper(trial, mode, divided):
        assert timed(trial, mode, divided) > 0
        return divided.speeds.step(divided.counts)

    return wrapper


def keeping_gradients(update):
    """`update` of the loop; rank 0 keeps the gradients that the first one is taken by, where speeds were told."""

    def wrapper(session):
        if session.state.step == 0 and auto.alone is not alone:
            session.state.exchange.settle()
            gradients = [whole(parameter, session.state.exchange) for parameter in session.state.net.parameters()]
            if session.world.is_main:
                torch.save(torch.cat(gradients), HASHES.with_name(f"{session.config.name}.gradients"))
        update(session)

    return wrapper


def whole(parameter, exchange) -> torch.Tensor:
    """A parameter's gradient as its owner, if it has one, holds it."""
    gradient = parameter.grad.flatten()
    if (owner := exchange.owner(parameter)) is not None:
        torch.distributed.broadcast(gradient, owner)
    return gradient


def scaled(*_) -> Precision:
    """In place of resolve_precision: loss scaling, without fp16's arithmetic, which takes a CPU minutes."""
    return Precision("fp16")


def overflowing(update):
    """`update` of the loop, under loss scaling with a gradient that has overflowed on one rank."""

    def wrapper(session):
        if session.precision == "fp16" and session.state.step == 1 and session.world.rank == 1:
            next(session.state.net.parameters()).grad[0, 0, 0, 0] = torch.inf
        update(session)

    return wrapper


def cut(source: Path, folder: Path, step: int) -> None:
    """Copy a run folder without its end."""
    shutil.copytree(source, folder)
    (folder / "summary.json").unlink()
    for path in checkpoint.listed(folder / "checkpoints"):
        if checkpoint.step_of(path) > step:
            path.unlink()


def run(plan: Path, rank: str) -> int:
    """This rank's part of every training."""
    for training in json.loads(plan.read_text()):
        if rank == "0" and training["cut"]:
            cut(Path(training["cut"]["from"]), Path(training["cut"]["to"]), training["cut"]["step"])
        speeds = training.get("speeds")
        apart = training.get("apart") or training.get("slow") or speeds
        os.environ["LOCAL_WORLD_SIZE"] = "1" if apart else os.environ["WORLD_SIZE"]
        auto.measure = slow(measure) if training.get("slow") else measure
        auto.alone = told(alone, speeds) if speeds else alone
        auto.timed = as_told(timed) if speeds else timed
        later = iter(training.get("later", []))
        rank_speeds.own_seconds = lambda found, shares, later=later: next(later, None) or own_seconds(found, shares)
        opening.resolve_precision = scaled if training.get("scaled") else resolve_precision
        os.environ["MASTER_PORT"] = str(training["port"])
        if code := main(["train", *training["arguments"]]):
            return code
    return 0


if __name__ == "__main__":
    HASHES = Path(sys.argv[1]).with_name(f"hashes.{os.environ['RANK']}")
    epochs.finish, ending.complete = noted(epochs.finish), noted(ending.complete)
    resolve_precision = opening.resolve_precision
    device.DTYPES["fp16"] = torch.bfloat16
    alone, timed, measure, own_seconds = auto.alone, auto.timed, auto.measure, rank_speeds.own_seconds
    loop.update = keeping_gradients(overflowing(loop.update))
    LocalSGD._average_movement = noted_when_averaged(LocalSGD._average_movement)
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
    sys.exit(run(Path(sys.argv[1]), os.environ["RANK"]))
