"""The training loop: read `train` from top to bottom and nothing is hidden."""

from __future__ import annotations

import argparse
import contextlib
import signal
import threading
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from k8scifar import heartbeat
from k8scifar.config import loading
from k8scifar.console import say
from k8scifar.data import holdout
from k8scifar.errors import PREEMPTED
from k8scifar.ranks.agree import Agreement
from k8scifar.ranks.device import autocast
from k8scifar.ranks.world import check_size, join, read
from k8scifar.results import ownership
from k8scifar.results.summary import describe
from k8scifar.training import compiling, memory, optim
from k8scifar.training.evaluation import Stopped
from k8scifar.training.plan import Plan
from k8scifar.training.resume import find
from k8scifar.training.session import Session
from k8scifar.training.supply import prepared, supply

add_arguments = loading.add_arguments


class Preempted(Exception):
    """SIGTERM came; the state is saved."""


def run(args: argparse.Namespace) -> int:
    """`k8scifar train`: one rank."""
    config = loading.from_arguments(args)
    memory.keep()
    check_size(config)
    manifest = prepared(config)
    with join(config, config.run_dir) as world:
        compiling.check(config, world.device)
        manifest = supply(config, manifest, world)
        plan = Plan(config, holdout.left(manifest, config.data.holdout))
        finished, checkpoint = find(config, manifest, world)
        if finished:
            if world.keeps:
                say(f"already finished: {describe(finished, config.run_dir)}")
            return 0
        session = Session(config, manifest, plan, world, checkpoint)
        try:
            with _sigterm() as stop:
                train(session, stop)
            session.complete()
        except Preempted:
            session.display.write(f"stopped by SIGTERM at step {session.state.step}; saved; the same command resumes")
            return PREEMPTED
        finally:
            session.close()
            ownership.leave()
    return 0


def train(session: Session, stop: threading.Event) -> None:
    """Train to the last step; collective. Raises Preempted once `stop` is set on any rank and the state is saved."""
    config, world, state, plan = session.config, session.world, session.state, session.plan
    clock, agreement, images = session.clock, session.agreement, session.train_images
    first_layer = next(state.net.parameters())  # backward reaches it last: what follows is waiting for the ranks

    is_last = True  # of this rank's micro-batches in a step: after it the ranks exchange

    def computed(_: torch.Tensor) -> None:
        if is_last:
            clock.mark("communication")
            world.pulse.arrive()

    hook = first_layer.register_post_accumulate_grad_hook(computed)
    mine, mine_epoch = None, -1
    bad = False
    while True:
        # The end of an epoch: evaluate, record, save.
        if session.epoch_is_over:
            try:
                session.finish_epoch(lambda: _keep_going(agreement, stop))
            except Stopped:
                session.save(must=True)
                raise Preempted from None
            done = state.step == plan.steps
            if done or len(state.history) % config.checkpoint.every_epochs == 0:
                session.save(must=done)
            session.display.resume(state.step)
        if state.step >= plan.steps:
            hook.remove()
            return

        # One step: this rank's micro-batches of the global batch.
        agreement.begin(stop=stop.is_set(), save=session.wants_checkpoint, bad=bad)
        epoch, step_in_epoch = divmod(state.step, plan.steps_per_epoch)
        if mine_epoch != epoch:
            mine, mine_epoch = plan.order.share(epoch, world.rank, state.shares.counts).to(world.device), epoch
        pixels, lr = plan.pixels(state.step), plan.lr(state.step)
        micro_batches = mine[step_in_epoch]
        session.meter.begin(pixels)
        optim.set_lr(state.optimizer, lr)
        step_loss = torch.zeros((), dtype=torch.float64, device=world.device)
        done = 0
        for together in micro_batches.split(state.passes(len(micro_batches))):
            clock.mark("data")
            samples = together.flatten()
            inputs = images.augmented(samples, pixels, seed=config.seed, epoch=epoch, **dict(config.augment))
            labels = images.labels[samples]
            clock.mark("compute")
            is_last = done + len(together) == len(micro_batches)
            with contextlib.nullcontext() if is_last else state.ddp.no_sync():
                with (
                    state.statistics.following(done, len(together), len(micro_batches)),
                    autocast(world.device, session.precision),
                ):
                    logits = state.exchange.model(inputs)
                loss = F.cross_entropy(logits.float(), labels, label_smoothing=config.label_smoothing)
                # The ranks' gradients are averaged.
                state.scaler.scale(loss * len(together) / state.shares.mean).backward()
            with torch.no_grad():
                step_loss += loss * len(together) / len(micro_batches)
                state.sums[0] += loss * len(labels)
                state.sums[1] += (logits.argmax(1) == labels).sum()
                state.sums[2] += len(labels)
            done += len(together)
        state.exchange.after_backward()
        clock.mark("updates")
        session.step()
        state.optimizer.zero_grad(set_to_none=False)  # the gradients are views into DDP's buckets
        state.step += 1
        clock.mark("communication")
        state.exchange.after_step(step_in_epoch + 1, epoch_ends=session.epoch_is_over)
        clock.mark("between steps")
        heartbeat.touch()

        session.display.step(state.step, partial(read, step_loss, world), lr, inputs, clock.read)
        state.note_loss(step_loss)
        if world.device.type == "cpu" or state.step % config.log.every_steps == 0:  # reading a GPU's value waits for it
            bad = read(state.first_bad, world) > 0

        # Agree with the other ranks: stop, save, or give up.
        agreed = agreement.end()
        if "bad" in agreed:
            raise session.not_finite(state.step - 1)
        if agreed & {"stop", "save"}:
            session.save(must="stop" in agreed)
        if "stop" in agreed:
            raise Preempted


def _keep_going(agreement: Agreement, stop: threading.Event) -> bool:
    """Asked by all ranks between two batches of an evaluation: False once any rank is to stop."""
    heartbeat.touch()
    return not agreement.now(stop=stop.is_set())


@contextlib.contextmanager
def _sigterm() -> Any:
    """An event that SIGTERM sets, in place of ending the process."""
    stop = threading.Event()
    previous = signal.signal(signal.SIGTERM, lambda *_: stop.set())
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, previous)
