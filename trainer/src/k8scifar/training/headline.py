"""What a run says of itself before its first step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from k8scifar.training import model

if TYPE_CHECKING:
    from k8scifar.training.session import Session


def headline(session: Session) -> str:
    """One line that tells what is about to train."""
    config, world, step = session.config, session.world, session.state.step
    resumed = f"; resuming at step {step}" if step else ""
    return (
        f"{config.name or config.recipe}: {config.model.name}, {model.parameters(session.state.net):,} parameters, "
        f"{len(session.train_images):,} + {len(session.evaluated):,} {'held-out ' * bool(config.data.holdout)}images "
        f"({session.manifest.source}), "
        f"world size {world.size}, {world.device.type} {session.precision}"
        f"{', compiled' * config.hardware.compile}, {world.backend}, "
        f"{torch.get_num_threads()} thread(s) a rank, global batch {config.global_batch}, "
        f"{config.epochs} epochs of {session.plan.steps_per_epoch} steps{resumed}"
    )


def hint(session: Session) -> str:
    """What to do where training takes long for want of bf16."""
    if session.world.device.type != "cpu" or session.precision != "fp32" or session.config.epochs == 1:
        return ""
    ask = 'epochs=1 under another name (make train NAME=look ARGS="--set epochs=1")'
    return f"; this processor has no bf16: for a quick look, {ask}"
