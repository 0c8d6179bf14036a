"""The training loop: read `train` from top to bottom and nothing is hidden."""

from __future__ import annotations

import argparse
import contextlib
import signal
import threading
from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch.utils.hooks import RemovableHandle

from k8scifar import liveness
from k8scifar.config import loading
from k8scifar.console import say
from k8scifar.data import holdout
from k8scifar.errors import PREEMPTED
from k8scifar.ranks.agree import Agreement
from k8scifar.ranks.device import autocast
from k8scifar.ranks.world import check_size, join, read
from k8scifar.results import ownership
from k8scifar.results.summary import describe
from k8scifar.training import compiling, divergence, ending, epochs, loss_scaling, opening, optim, saving
from k8scifar.training.cpu import memory
from k8scifar.training.data_transfer import prepared, supply
from k8scifar.training.evaluation import Stopped
from k8scifar.training.plan import Plan
from k8scifar.training.resume import find
from k8scifar.training.session import Session

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
        session = opening.open_session(config, manifest, plan, world, checkpoint)
        try:
            with _sigterm() as stop:
                train(session, stop)
            ending.complete(session)
        except Preempted:
            session.display.write(f"stopped by SIGTERM at step {session.state.step}; saved; the same command resumes")
            return PREEMPTED
        finally:
            opening.close(session)
            ownership.leave()
    return 0


def train(session: Session, stop: threading.Event) -> None:
    """Train to the last step; collective. Raises Preempted once `stop` is set on any rank and the state is saved."""
    config, world, state, plan = session.config, session.world, session.state, session.plan
    clock, agreement, images = session.clock, session.agreement, session.train_images
    hook = _mark_waiting(session)
    mine, mine_epoch = None, -1
    bad = False  # whether a loss so far was not finite, on this rank
    while True:
        # The end of an epoch: evaluate, record, save.
        if session.epoch_is_over:
            try:
                epochs.finish(session, lambda: _keep_going(agreement, stop))
            except Stopped:
                saving.save(session, must=True)
                raise Preempted from None
            is_last = state.step == plan.steps
            if is_last or len(state.history) % config.checkpoint.every_epochs == 0:
                saving.save(session, must=is_last)
            session.display.resume(state.step)
        if state.step >= plan.steps:
            hook.remove()
            return

        # One step: this rank's micro-batches of the global batch, several in a pass where that is faster.
        agreement.begin(stop=stop.is_set(), save=saving.is_due(session), bad=bad)  # sent now, read after the step
        epoch, step_in_epoch = divmod(state.step, plan.steps_per_epoch)
        if mine_epoch != epoch:
            mine, mine_epoch = plan.order.share(epoch, world.rank, state.shares.counts).to(world.device), epoch
        pixels, lr = plan.pixels(state.step), plan.lr(state.step)
        micro_batches = mine[step_in_epoch]
        session.meter.begin(pixels)
        optim.set_lr(state.optimizer, lr)
        step_loss = torch.zeros((), dtype=torch.float64, device=world.device)
        done = 0  # micro-batches
        for together in micro_batches.split(state.passes(len(micro_batches))):
            clock.mark("data")
            samples = together.flatten()
            inputs = images.augmented(samples, pixels, seed=config.seed, epoch=epoch, **dict(config.augment))
            labels = images.labels[samples]
            clock.mark("compute")
            # Gradients add up over the passes. In the last one backward also starts the exchange: DDP hands each bucket
            # of gradients to the mode's hook, which sends a matrix's to its owner, or starts an all-reduce.
            sends = done + len(together) == len(micro_batches)
            with contextlib.nullcontext() if sends else state.ddp.no_sync():
                with (
                    state.statistics.following(done, len(together), len(micro_batches)),
                    autocast(world.device, session.precision),
                ):
                    logits = state.exchange.model(inputs)
                loss = F.cross_entropy(logits.float(), labels, label_smoothing=config.label_smoothing)
                # The exchange takes the mean over the ranks: so scaled, it is the mean over all micro-batches.
                state.scaler.scale(loss * len(together) / state.shares.mean).backward()
            with torch.no_grad():
                step_loss += loss * len(together) / len(micro_batches)
                state.sums[0] += loss * len(labels)
                state.sums[1] += (logits.argmax(1) == labels).sum()
                state.sums[2] += len(labels)
            done += len(together)
        state.exchange.after_backward()  # the mean gradients arrive; a matrix's, only when its owner needs it
        clock.mark("updates")
        update(session)  # owners compute Muon's directions and send them to all ranks; then all take the same step
        state.optimizer.zero_grad(set_to_none=False)  # the gradients are views into DDP's buckets
        state.step += 1
        clock.mark("communication")
        state.exchange.after_step(step_in_epoch + 1, epoch_ends=session.epoch_is_over)  # local SGD averages weights
        clock.mark("between steps")
        liveness.touch()

        session.display.step(state.step, partial(read, step_loss, world), lr, inputs, clock.read)
        state.record_first_bad(step_loss)
        if world.device.type == "cpu" or state.step % config.log.every_steps == 0:  # reading a GPU's value waits for it
            bad = read(state.first_bad, world) > 0

        # Agree with the other ranks: stop, save, or give up.
        agreed = agreement.end()
        if "bad" in agreed:
            raise divergence.error(session, state.step - 1)
        if agreed & {"stop", "save"}:
            saving.save(session, must="stop" in agreed)
        if "stop" in agreed:
            raise Preempted


def update(session: Session) -> None:
    """Take the optimiser's step, or skip it where a gradient overflowed in fp16; collective.

    Muon's step calls the exchange: each owner waits for the mean gradients of its matrices, computes their directions
    and sends them to all ranks. Raises UserError where the loss scale falls too low, and on a rank whose writer found
    that another process has the run folder Superseded.
    """
    state = session.state
    if session.writer and session.writer.late:
        raise session.writer.late
    scale = loss_scaling.step(state.scaler, state.optimizer, session.world)
    if scale is None:
        return
    session.display.write(f"step {state.step + 1} left out: gradients beyond fp16; the loss scale is now {scale:g}")
    if scale < loss_scaling.LEAST:
        raise divergence.error(session, state.step)


def _mark_waiting(session: Session) -> RemovableHandle:
    """Mark when this rank's gradients of a step are complete: from then on it waits for the other ranks."""

    def computed(_: torch.Tensor) -> None:
        if session.state.ddp.require_backward_grad_sync:  # False under `no_sync`
            session.clock.mark("communication")
            session.world.pulse.arrive()

    first_layer = next(session.state.net.parameters())  # backward reaches it last
    return first_layer.register_post_accumulate_grad_hook(computed)


def _keep_going(agreement: Agreement, stop: threading.Event) -> bool:
    """False once any rank is to stop. All ranks call it between two batches of an evaluation; collective."""
    liveness.touch()
    return not agreement.now(stop=stop.is_set())


@contextlib.contextmanager
def _sigterm() -> Iterator[threading.Event]:
    """Yield an event that SIGTERM sets, instead of ending the process."""
    stop = threading.Event()
    previous = signal.signal(signal.SIGTERM, lambda *_: stop.set())
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, previous)
