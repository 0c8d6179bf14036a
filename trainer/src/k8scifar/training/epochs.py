"""The end of an epoch: average the running statistics, evaluate, record."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from k8scifar.errors import TrainingError
from k8scifar.ranks import agree
from k8scifar.ranks.world import settle
from k8scifar.results import evaluated, participants
from k8scifar.results.outcome import Outcome
from k8scifar.results.progress import epoch_line
from k8scifar.training import calibration, divergence, evaluation, rank_speeds, saving
from k8scifar.training.session import Session


def finish(session: Session, keep_going: Callable[[], bool]) -> None:
    """Average the running statistics, evaluate if that is due, and record the epoch; collective.

    Raises evaluation.Stopped where `keep_going` ends the evaluation; the epoch then remains to be finished.
    """
    state, world, plan, step = session.state, session.world, session.plan, session.state.step
    seconds, is_last = time.monotonic() - session.epoch_began, step == plan.steps
    session.clock.mark("end of the epoch")
    sums = state.sums.clone()
    dist.all_reduce(sums)
    settle(world)
    divergence.check(session, sums, step)
    saving.equalise(session, agree.gather(state.digest(), world))
    agree.average(state.statistics.running(), world, weight=state.shares.weight(world.rank))
    record = _trained(session, *sums.tolist())
    every = session.config.evaluation.every_epochs
    if is_last or (every and record["epoch"] % every == 0):
        session.outcome = evaluate(session, record["pixels"], is_last, keep_going)
        figures = {key: value for key, value in session.outcome.figures.items() if key != "per_class"}
        record |= {f"{_prefix(session)}{key}": value for key, value in figures.items()}
    times = session.meter.read()
    record |= _speeds(session, seconds, times)
    if world.own_folders:
        record = agree.gather_json(record, world)[0]  # rank 0's times, so that all nodes write the same lines
    state.history.append(record)
    state.sums.zero_()
    session.save_seconds = 0.0
    _write(session, record)
    if times and not is_last:
        calibration.follow(session, rank_speeds.own_seconds(times, state.shares))
    session.epoch_began = time.monotonic()


def evaluate(session: Session, pixels: int, is_last: bool, keep_going: Callable[[], bool]) -> Outcome:
    """Evaluate the weights; the last time on all images, with test-time augmentation. Collective."""
    settings = session.config.evaluation
    return evaluation.evaluate(
        session.state.net,
        session.evaluation_images,
        session.world,
        classes=len(session.manifest.classes),
        pixels=pixels,
        batch=settings.batch,
        limit=0 if is_last else settings.interim_images,
        tta=is_last and settings.tta,
        precision=session.precision,
        turns=[round(speed) for speed in session.state.shares.relative],
        keep_going=keep_going,
    )


def _trained(session: Session, loss: float, correct: float, images: float) -> dict[str, Any]:
    """The record's part on training, from sums over the epoch's images on all ranks."""
    step = session.state.step
    return {
        "epoch": step // session.plan.steps_per_epoch,
        "step": step,
        "data": session.manifest.source,
        "pixels": session.plan.pixels(step - 1),
        "lr": session.plan.lr(step - 1),
        "train_loss": loss / images,
        "train_accuracy": correct / images,
    }


def _speeds(session: Session, seconds: float, times: rank_speeds.Times) -> dict[str, Any]:
    """The record's part on ranks and times. `seconds`: of this process's part of the epoch."""
    state, config, step, length = session.state, session.config, session.state.step, session.plan.steps_per_epoch
    steps = step - max(session.first_step, step - length)
    found: dict[str, Any] = {}
    if len(state.members) > 1:  # else the same ranks took part from the first step on
        found["members"] = participants.within(state.members, step - length, step)
    found["images_per_second"] = round(steps * config.global_batch / max(seconds, 1e-9), 1)
    found["seconds"] = round(session.seconds, 1)
    found["checkpoint_seconds"] = round(session.save_seconds, 3)
    if speed := rank_speeds.speed(times, state.shares, session.world, config.global_batch):
        found["speed"] = speed
    return found


def _write(session: Session, record: dict[str, Any]) -> None:
    """Write the history to the run folder, and on rank 0 show the epoch's record."""
    if not session.world.keeps:
        return
    try:
        session.folder.write_metrics(session.state.history)
    except TrainingError as error:  # the next epoch writes all lines again
        session.log(f"{error}; training goes on")
    if not session.world.is_main:
        return
    board, step = session.display.board, session.state.step
    prefixes = ("train_", *evaluated.PREFIXES.values())
    curves = {name.replace("_", "/", 1): value for name, value in record.items() if name.startswith(prefixes)}
    board.scalars(curves, step)
    if session.outcome:
        board.outcome(session.outcome, session.evaluated, session.manifest.classes, _prefix(session).strip("_"), step)
    session.display.write(epoch_line(record, session.config.epochs))


def _prefix(session: Session) -> str:
    """Of the keys of an evaluation's figures: `test_`, or that of images held out."""
    return evaluated.PREFIXES[evaluated.word(session.config.data.holdout)]
