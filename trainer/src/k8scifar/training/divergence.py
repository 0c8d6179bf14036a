"""Stop a run whose losses or weights are not finite, with the step at which that began."""

from __future__ import annotations

import torch

from k8scifar.errors import UserError
from k8scifar.ranks import agree
from k8scifar.training import checkpoint
from k8scifar.training.session import Session


def check(session: Session, sums: torch.Tensor, step: int) -> None:
    """Raise UserError where the ranks' sums over losses or weights are not finite; collective then."""
    if not torch.isfinite(sums).all():
        raise error(session, step)


def error(session: Session, step: int) -> UserError:
    """The error with step, learning rate and last good checkpoint; collective.

    Args:
        step: at which the ranks detected it. The message has the first step that a rank recorded, if there is one.
    """
    first = agree.gather(session.state.first_bad.view(1), session.world)
    step = int(min(first[first > 0], default=step))
    files = checkpoint.listed(session.folder.checkpoints) if session.world.is_main else []
    good = f"the last good checkpoint is {files[0]}" if files else "there is no checkpoint before it"
    return UserError(
        f"loss or weights are not finite at step {step} (epoch {step / session.plan.steps_per_epoch:.2f}, learning "
        f"rate {session.plan.lr(step - 1):.4g}); {good}; lower optimizer.lr or lengthen schedule.warmup"
    )
