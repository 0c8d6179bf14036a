"""A run that is open on one rank, as data: opening.py makes it; the loop, epochs.py, saving.py and ending.py use it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from k8scifar.config.schema import Config
from k8scifar.data.augment import Images
from k8scifar.data.packed import Manifest, Split
from k8scifar.ranks.agree import Agreement
from k8scifar.ranks.world import World
from k8scifar.results.display import Display
from k8scifar.results.outcome import Outcome
from k8scifar.results.run_folder import RunFolder
from k8scifar.training.checkpoint import Writer
from k8scifar.training.clock import StepClock
from k8scifar.training.plan import Plan
from k8scifar.training.rank_speeds import Meter
from k8scifar.training.state import State


@dataclass
class Session:
    """The parts of an open run, and what this process remembers between its steps."""

    config: Config
    manifest: Manifest
    plan: Plan
    world: World
    precision: str  # of the forward passes: bf16, fp16 or fp32
    folder: RunFolder
    train_images: Images
    evaluation_images: Images
    evaluated: Split  # the evaluation images in the host's memory: the test images, or those held out
    state: State
    agreement: Agreement  # flags that the ranks exchange during each step
    clock: StepClock
    meter: Meter
    display: Display
    log: Callable[[str], None]  # a line from this node, on every rank; `display.write` logs on rank 0 alone
    writer: Writer | None  # None on the ranks that keep no run folder, and once it is closed
    first_step: int  # steps that were done when this process started
    began: float  # monotonic seconds: when the run would have begun if this process had computed all of it
    epoch_began: float  # monotonic seconds, of this process's part of the epoch
    saved: float  # monotonic seconds, of the last checkpoint
    save_seconds: float = 0.0  # that checkpoints have held up the loop in this epoch
    written: tuple[int, int] = (0, 0)  # step and digest of the newest file of a closed writer
    drift_is_logged: bool = False
    outcome: Outcome | None = None  # of the last evaluation in this process

    @property
    def seconds(self) -> float:
        """Seconds that the run has taken in all processes; steps that a crash undid do not count."""
        return time.monotonic() - self.began

    @property
    def epoch_is_over(self) -> bool:
        """Whether an epoch's last step is done and its evaluation and record are not."""
        return self.state.step == (len(self.state.history) + 1) * self.plan.steps_per_epoch
