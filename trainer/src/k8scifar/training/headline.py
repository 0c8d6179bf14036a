"""The line that describes a run before its first step, and advice for slow processors."""

from __future__ import annotations

import torch

from k8scifar.config.schema import Config
from k8scifar.training import model
from k8scifar.training.session import Session


def headline(session: Session) -> str:
    """Model, images, ranks and length of the run in one line."""
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


def hint(config: Config, device: torch.device, precision: str) -> str:
    """Advice where training is slow because the processor has no bf16; else empty."""
    if device.type != "cpu" or precision != "fp32" or config.epochs == 1:
        return ""
    command = 'epochs=1 under another name (make train NAME=look ARGS="--set epochs=1")'
    return f"; this processor has no bf16: for a quick look, {command}"
