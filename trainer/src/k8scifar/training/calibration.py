"""Choose how the ranks communicate and divide each step: by measured steps when they meet, by their clocks later."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch

from k8scifar.data.augment import Images
from k8scifar.exchange import auto, shares
from k8scifar.exchange.shares import Shares, Speeds
from k8scifar.training import model
from k8scifar.training.plan import Plan
from k8scifar.training.session import Session
from k8scifar.training.state import State


class Reasons(NamedTuple):
    """The reasons of both choices, for the log; empty where there was nothing to choose."""

    communication: str
    shares: str


def choose(state: State, plan: Plan, images: Images, precision: str, payload: dict[str, Any] | None) -> Reasons:
    """Give `state` its exchange and its shares, before the checkpoint `payload` is restored into it; collective.

    `images`: of the training split.
    """
    config, world = state.config, state.world
    kept = payload if payload and payload["world_size"] == world.size else {}
    before = Shares.from_saved(kept.get("share"), config.micro_batches, world.size) if kept else None
    pixels = plan.pixels(payload["step"] if payload else 0)
    trial = auto.Trial(
        state.ddp,
        state.optimizer,
        functools.partial(_batch, state, images, pixels),
        state.passes,
        functools.partial(_following, state),
        precision,
        world,
        config,
    )
    speeds = functools.cache(functools.partial(auto.alone, trial, pixels))  # measured once, if a choice needs them
    wire = functools.partial(_wire, trial, speeds, before)
    chosen, why = auto.choose(config, world, kept.get("comm"), model.parameters(state.net), wire)
    timed = functools.partial(auto.timed, trial, chosen.mode)
    divided, why_so = shares.choose(config, world, before, chosen.mode, speeds, timed)
    state.communicate(chosen.mode, chosen.every)  # after the trials, because it replaces their DDP hooks
    state.take_shares(divided)
    return Reasons(why, why_so)


def follow(session: Session, seconds: list[float]) -> None:
    """Divide the micro-batches anew if the ranks' speeds have changed enough for it.

    `seconds`: of a micro-batch by rank, the same on all ranks.
    """
    state, world = session.state, session.world
    old = state.shares
    if old.speeds is None or not shares.follows(session.config, world, state.exchange.name):
        return
    now = old.speeds.now(seconds)
    counts = shares.better(old.counts, now)
    if counts == old.counts:
        return
    state.take_shares(Shares(counts, now))
    log_shares(session, f"shares: {state.shares} from step {state.step} on; {shares.slow(now, world)}")


def log_shares(session: Session, text: str) -> None:
    """Show a division in the log, and on TensorBoard. An empty `text` means that there was nothing to divide."""
    if not text:
        return
    session.display.write(text)
    counts = enumerate(session.state.shares.counts)
    session.display.board.scalars({f"share/rank_{rank}": count for rank, count in counts}, session.state.step)


def _wire(trial: auto.Trial, speeds: Callable[[], Speeds], before: Shares | None) -> auto.Times:
    """Time the wire, for the shares that the ranks will have: the checkpoint's (`before`), or by speed."""
    config = trial.config
    counts = before.counts if before else shares.equal(config.micro_batches, trial.world.size)
    if config.distributed.share == "auto" and not before:
        counts = shares.better(counts, speeds())
    return auto.measure(trial, speeds(), counts)


def _batch(state: State, images: Images, pixels: int, micro_batches: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Augmented inputs and labels of the first training images, as many as are in so many micro-batches."""
    config = state.config
    samples = torch.arange(micro_batches * config.micro_batch, device=state.world.device) % len(images)
    inputs = images.augmented(samples, pixels, seed=config.seed, epoch=0, **dict(config.augment))
    return inputs, images.labels[samples]


def _following(state: State, micro_batches: int) -> AbstractContextManager[None]:
    """`Statistics.following` for a step of so many micro-batches in one pass."""
    return state.statistics.following(0, micro_batches, micro_batches)
