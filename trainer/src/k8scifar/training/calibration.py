"""How the work of a step is settled: how the ranks communicate, and who computes how much, then and later."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch

from k8scifar.config.schema import Config
from k8scifar.data.augment import Images
from k8scifar.exchange import auto, cost_model, shares, trials
from k8scifar.ranks.world import World
from k8scifar.training import model
from k8scifar.training.plan import Plan
from k8scifar.training.state import State


def settle(
    config: Config,
    world: World,
    state: State,
    plan: Plan,
    images: Images,
    precision: str,
    payload: dict[str, Any] | None,
) -> tuple[str, str]:
    """Settle both for `state`, before `payload` (a checkpoint) is restored; collective. Returns why, for each.

    `images`: the training split's.
    """
    kept = payload if payload and payload["world_size"] == world.size else {}
    before = shares.Shares.from_saved(kept.get("share"), config.micro_batches, world.size) if kept else None
    pixels = plan.pixels(payload["step"] if payload else 0)

    def batch(together: int) -> tuple[torch.Tensor, torch.Tensor]:
        samples = torch.arange(together * config.micro_batch, device=world.device) % len(images)
        inputs = images.augmented(samples, pixels, seed=config.seed, epoch=0, **dict(config.augment))
        return inputs, images.labels[samples]

    def following(together: int) -> contextlib.AbstractContextManager[None]:
        return state.statistics.following(0, together, together)

    trial = trials.Trial(state.ddp, state.optimizer, batch, state.passes, following, precision, world, config)
    speeds = functools.cache(lambda: trials.measure_speeds(trial, pixels))

    def wire() -> cost_model.Times:
        counts = before.counts if before else shares.equal(config.micro_batches, world.size)
        if config.distributed.share == "auto" and not before:
            counts = cost_model.better(counts, speeds())
        return trials.measure_modes(trial, speeds(), counts)

    chosen, why = auto.choose_mode(config, world, kept.get("comm"), model.parameters(state.net), wire)
    # The trials leave hooks behind, in whose place those of the mode are put.
    measure_step = functools.partial(trials.measure_step, trial, chosen.mode)
    divided, why_so = shares.choose_shares(config, world, before, chosen.mode, speeds, measure_step)
    state.communicate(chosen.mode, chosen.every)
    state.take_shares(divided)
    return why, why_so


def follow(config: Config, world: World, state: State, seconds: list[float]) -> str:
    """Divide the micro-batches anew if the ranks' speeds have changed enough for it; returns what to say of it.

    `seconds`: of a micro-batch by rank, the same on all ranks.
    """
    old = state.shares
    if old.speeds is None or not shares.follows(config, world, state.exchange.name):
        return ""
    now = old.speeds.now(seconds)
    counts = cost_model.better(old.counts, now)
    if counts == old.counts:
        return ""
    state.take_shares(shares.Shares(counts, now))
    return f"from step {state.step} on, {shares.sentence(state.shares, world)}"
