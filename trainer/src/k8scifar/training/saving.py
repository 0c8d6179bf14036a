"""Checkpoints of an open run: when one is due, how the ranks agree on its values, and who writes it."""

from __future__ import annotations

import time

import torch

from k8scifar.ranks import agree
from k8scifar.ranks.world import settle
from k8scifar.results import evaluated
from k8scifar.training import checkpoint, divergence
from k8scifar.training.session import Session


def is_due(session: Session) -> bool:
    """Whether to save after the step that is about to be taken, within an epoch; False on all ranks but 0."""
    settings, step = session.config.checkpoint, session.state.step + 1
    at_step = bool(settings.every_steps) and step % settings.every_steps == 0
    is_old = bool(settings.every_seconds) and time.monotonic() - session.saved > settings.every_seconds
    return session.world.is_main and (at_step or is_old) and step % session.plan.steps_per_epoch > 0


def save(session: Session, must: bool = False) -> None:
    """Copy the state and hand it to the writer's thread; collective. Raises UserError where a value is not finite.

    A node whose volume is still busy with earlier checkpoints skips this one, unless it `must` be written.
    """
    begun, state, writer = time.monotonic(), session.state, session.writer
    session.clock.mark("saving")
    settle(session.world)
    skips = not must and (writer is None or writer.behind)
    own = torch.tensor([skips, session.seconds, *(writer.written if writer else (0, 0))], dtype=torch.float64)
    row = torch.cat([state.sums.cpu(), state.weight_sum(), state.digest(), own])
    sums, digests, skip, seconds, written = agree.gather(row, session.world).split([4, 1, 1, 1, 2], dim=1)
    divergence.check(session, sums, state.step)
    state.seconds = seconds[0].item()  # rank 0's, so that all nodes write the same file
    equalise(session, digests)
    log_drift(session, [(int(step), int(digest)) for step, digest in written])
    payload = {} if skip.all() else state.snapshot(session.plan.pixels(max(0, state.step - 1)))
    if writer and skips:
        session.log(f"checkpoint of step {state.step} left out: the volume is still busy with earlier ones")
    elif writer:
        writer.save(payload, state.step, evaluated.best_first(state.history))
    session.saved = time.monotonic()
    session.save_seconds += session.saved - begun
    session.clock.mark("between steps")


def equalise(session: Session, digests: torch.Tensor) -> None:
    """Give all ranks rank 0's weights where the ranks' `digests` of them differ; collective.

    Processors that round differently (AVX2 beside none, ARM beside x86) take steps that differ in the last bits.
    """
    odd = [rank for rank, differs in enumerate((digests.flatten() != digests.flatten()[0]).tolist()) if differs]
    if not odd:
        return
    session.state.equalise()
    if session.drift_is_logged:
        return
    session.drift_is_logged = True
    session.display.write(
        f"the weights of rank {', '.join(map(str, odd))} had drifted from rank 0's by step {session.state.step}: their "
        "processors round differently; from here on rank 0's replace them at each checkpoint and epoch"
    )


def log_drift(session: Session, written: list[tuple[int, int]]) -> None:
    """Log where the nodes' newest checkpoints of one step differ. `written`: each rank's, as Writer.written."""
    if difference := checkpoint.differing(written):
        session.display.write(f"the nodes have drifted apart: {difference}")


def close_writer(session: Session) -> None:
    """Wait until the writer's files are on the disk. Raises Superseded where another process has the run folder."""
    writer, session.writer = session.writer, None
    if writer:
        writer.close()
        session.written = writer.written
        if writer.late:
            raise writer.late
