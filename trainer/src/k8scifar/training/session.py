"""One run's parts, put together: data, state, records. The loop in loop.py uses them."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from k8scifar.config.schema import Config
from k8scifar.console import say
from k8scifar.data import holdout, packed
from k8scifar.data.augment import Images
from k8scifar.errors import TrainingError, UserError
from k8scifar.ranks import agree
from k8scifar.ranks.device import resolve_precision
from k8scifar.ranks.world import World, settle
from k8scifar.results import evaluated, members
from k8scifar.results.display import Display
from k8scifar.results.outcome import Outcome
from k8scifar.results.progress import epoch_line
from k8scifar.results.run_folder import RunFolder
from k8scifar.training import checkpoint, ending, headline, meter, scaling, work
from k8scifar.training.clock import StepClock
from k8scifar.training.evaluation import SHIFT, evaluate
from k8scifar.training.plan import Plan
from k8scifar.training.state import State


class Session:
    """A run that is open on this rank. Opening is collective, and resumes the newest good checkpoint.

    Raises UserError where ranks, data, configuration and checkpoint do not fit each other.
    """

    def __init__(
        self, config: Config, manifest: packed.Manifest, plan: Plan, world: World, found: bytes | None
    ) -> None:
        self.config, self.manifest, self.world = config, manifest, world
        self.folder = RunFolder(config.run_dir)
        precision = resolve_precision(config, world.device, world.host_group)
        self.precision = precision.name
        self.plan = plan
        train, self.evaluated = holdout.splits(Path(config.data.dir), manifest, config.data.holdout)
        self.evaluated_word = evaluated.word(config.data.holdout)
        self.train_images = self._on_device(train, border=config.augment.translate)
        self.evaluation_images = self._on_device(self.evaluated, SHIFT if config.evaluation.tta == "shifts" else 0)
        # Fresh weights, then the exchange, then the checkpoint: the mode is measured on a model that may still change,
        # and decides which of the checkpoint's tensors there are to be restored.
        self.state = State.fresh(config, manifest, world, self.train_images, self.precision)
        payload = checkpoint.decode(found, "the checkpoint") if found is not None else None
        why, why_so = work.settle(config, world, self.state, plan, self.train_images, self.precision, payload)
        changed, merged = self.state.restore(payload) if payload else ("", "")
        self.first_step = self.state.step
        now = members.present(self.first_step, world.size)
        self.state.members = members.joined(self.state.members, now)
        self.agreement = agree.Agreement(world, ("stop", "save", "bad"))
        several = world.local_size < world.size
        self.clock = StepClock(world.device, running=world.is_main or several)
        self.meter = meter.Meter(self.clock, world, running=several)
        self.state.exchange.mark = self.clock.mark
        # Last what people see and what writes: nothing is shown or written of a run that could not be opened.
        self.display = Display(config, manifest, self.plan, self.first_step, world.is_main, headline.hint(self))
        self.display.text("configuration", config.to_yaml())
        self.tell = self.display.write if world.is_main else say  # what this node has to say for itself
        self._writer = None
        if world.keeps:
            keep = config.checkpoint.keep
            self._writer = checkpoint.Writer(self.folder.checkpoints, keep, self.tell, before=self.folder.check)
        self._spent = self.state.seconds
        self._started = self._epoch_started = self._saved = time.monotonic()
        self._drift_told = False
        self._written = (0, 0)
        self._stalled = 0.0  # seconds of this epoch that checkpoints have taken from the loop
        self.outcome: Outcome | None = None
        if world.size > 1:
            self.display.write(f"communication: {self.state.exchange.label}; {why}")
        self._tell_shares(why_so)
        if world.is_main and (len(now["nodes"]) > 1 or len(self.state.members) > 1):
            self._tell_members()
        if changed:
            self.display.write(f"going on with other settings than the checkpoint's: {changed}")
        if merged:
            self.display.write(f"the checkpoint of step {self.first_step} was written by other ranks: {merged}")
        self.display.write(headline.headline(self))
        if precision.note:
            self.display.write(precision.note)

    @property
    def wants_checkpoint(self) -> bool:
        """On rank 0, whether the step about to be taken ends at the interval that the configuration asks for."""
        settings, step = self.config.checkpoint, self.state.step + 1
        at_step = bool(settings.every_steps) and step % settings.every_steps == 0
        is_old = bool(settings.every_seconds) and time.monotonic() - self._saved > settings.every_seconds
        return self.world.is_main and (at_step or is_old) and step % self.plan.steps_per_epoch > 0

    def save(self, must: bool = False) -> None:
        """Hand a checkpoint of the present state to the writer; collective. Raises UserError where it holds garbage.

        A volume that is still busy with former ones makes it leave this one out, unless it `must` be written.
        """
        begun, state = time.monotonic(), self.state
        self.clock.mark("saving")
        settle(self.world)
        behind = not must and (not self._writer or self._writer.behind)  # it is left out where no node can take it
        written = self._writer.written if self._writer else (0, 0)
        flags = torch.tensor([behind, *written, self._seconds], dtype=torch.float64)
        own = torch.cat([state.sums.cpu(), state.weight_sum(), state.digest(), flags])
        facts = agree.gather(own, self.world)
        self.check_finite(facts, state.step)
        state.seconds = facts[0, 8].item()  # rank 0's, for the nodes' files are the same
        self._equalise(facts[:, 4])
        self.tell_drift([(int(row[6]), int(row[7])) for row in facts])
        payload = {} if facts[:, 5].all() else state.snapshot(self.plan.pixels(max(0, state.step - 1)))
        if self._writer and behind:
            self.tell(f"checkpoint of step {state.step} left out: the volume is still busy with former ones")
        elif self._writer:
            self._writer.save(payload, state.step, evaluated.best_first(state.history))
        self._saved = time.monotonic()
        self._stalled += self._saved - begun
        self.clock.mark("between steps")

    def tell_drift(self, written: list[tuple[int, int]]) -> None:
        """Say so where the nodes' newest checkpoints of one step differ; `written`: each rank's checkpoint.Writer's."""
        if told := checkpoint.differing(written):
            self.display.write(f"the nodes have drifted apart: {told}")

    def _equalise(self, digests: torch.Tensor) -> None:
        """Make the ranks' weights equal again where the digests say that they are not; collective.

        Processors that round unlike (AVX2 beside none, ARM beside x86) take steps that differ in the last bits.
        """
        odd = [rank for rank, digest in enumerate(digests.tolist()) if digest != digests[0]]
        if not odd:
            return
        self.state.equalise()
        if not self._drift_told:
            self._drift_told = True
            self.display.write(
                f"the weights of rank {', '.join(map(str, odd))} had drifted from rank 0's by step {self.state.step}: "
                "their processors round differently; from here on they are made equal at each checkpoint and epoch"
            )

    def step(self) -> None:
        """The optimiser's step; one whose gradients overflowed in fp16 is left out, and told. Raises UserError.

        On rank 0 raises Superseded, too, once a checkpoint found that another process has the run folder.
        """
        state = self.state
        if self._writer and self._writer.late:
            raise self._writer.late
        scale = scaling.step(state.scaler, state.optimizer, self.world)
        if scale is None:
            return
        self.display.write(f"step {state.step + 1} left out: gradients beyond fp16; the loss scale is now {scale:g}")
        if scale < scaling.LEAST:
            raise self.not_finite(state.step)

    def check_finite(self, sums: torch.Tensor, step: int) -> None:
        """Raise UserError where sums over losses or weights are garbage."""
        if not torch.isfinite(sums).all():
            raise self.not_finite(step)

    def not_finite(self, step: int) -> UserError:
        """What to say of losses or weights that are not finite: step, learning rate, last good checkpoint; collective.

        `step` is when it was noticed; the first one that a rank remembers is told.
        """
        first = agree.gather(self.state.first_bad.view(1), self.world)
        step = int(min(first[first > 0], default=step))
        files = checkpoint.listed(self.folder.checkpoints) if self.world.is_main else []
        good = f"the last good checkpoint is {files[0]}" if files else "there is no checkpoint before it"
        return UserError(
            f"loss or weights are not finite at step {step} (epoch {step / self.plan.steps_per_epoch:.2f}, learning "
            f"rate {self.plan.lr(step - 1):.4g}); {good}; lower optimizer.lr or lengthen schedule.warmup"
        )

    @property
    def _seconds(self) -> float:
        """What the run has taken so far, in all processes; what came after a checkpoint that was resumed is lost."""
        return self._spent + time.monotonic() - self._started

    @property
    def epoch_is_over(self) -> bool:
        """Whether an epoch's last step is done and its end (evaluation, record) is not."""
        return self.state.step == (len(self.state.history) + 1) * self.plan.steps_per_epoch

    def finish_epoch(self, keep_going: Callable[[], bool]) -> None:
        """Average the statistics, evaluate if due, record the epoch; collective.

        Raises evaluation.Stopped where `keep_going` ends the evaluation; the epoch is then still to be finished.
        """
        state, step = self.state, self.state.step
        epoch, final = step // self.plan.steps_per_epoch, step == self.plan.steps
        seconds = time.monotonic() - self._epoch_started
        self.clock.mark("end of the epoch")
        sums = state.sums.clone()
        dist.all_reduce(sums)
        settle(self.world)
        self.check_finite(sums, step)
        self._equalise(agree.gather(state.digest(), self.world).flatten())
        agree.average(state.statistics.running(), self.world, weight=state.shares.weight(self.world.rank))
        pixels = self.plan.pixels(step - 1)
        record: dict[str, Any] = {
            "epoch": epoch,
            "step": step,
            "data": self.manifest.source,
            "pixels": pixels,
            "lr": self.plan.lr(step - 1),
            "train_loss": (sums[0] / sums[2]).item(),
            "train_accuracy": (sums[1] / sums[2]).item(),
        }
        every = self.config.evaluation.every_epochs
        if final or (every and epoch % every == 0):
            self.outcome = self.evaluate(pixels, final, keep_going)
            prefix = evaluated.PREFIXES[self.evaluated_word]
            record |= {f"{prefix}{key}": value for key, value in self.outcome.figures.items() if key != "per_class"}
        steps_here = step - max(self.first_step, step - self.plan.steps_per_epoch)
        if len(state.members) > 1:  # else all did, all the time
            record["members"] = members.within(state.members, step - self.plan.steps_per_epoch, step)
        record["images_per_second"] = round(steps_here * self.config.global_batch / max(seconds, 1e-9), 1)
        record["seconds"] = round(self._seconds, 1)
        record["checkpoint_seconds"], self._stalled = round(self._stalled, 3), 0.0
        found = self.meter.read()
        if speed := meter.speed(found, state.shares, self.world, self.config.global_batch):
            record["speed"] = speed
        if self.world.own_folders:
            record = agree.gather_json(record, self.world)[0]  # all nodes keep rank 0's times
        state.history.append(record)
        state.sums.zero_()
        self._record(record)
        if found and not final:
            own = meter.own_seconds(found, state.shares)
            self._tell_shares(work.follow(self.config, self.world, state, own))
        self._epoch_started = time.monotonic()

    def _tell_shares(self, text: str) -> None:
        """Show a division in the log, if there is something to say, and on TensorBoard."""
        if not text:
            return
        self.display.write(text)
        counts = enumerate(self.state.shares.counts)
        self.display.board.scalars({f"share/rank_{rank}": count for rank, count in counts}, self.state.step)

    def evaluate(self, pixels: int, final: bool, keep_going: Callable[[], bool]) -> Outcome:
        """Evaluate the weights; the last time on all images, with TTA."""
        settings = self.config.evaluation
        return evaluate(
            self.state.net,
            self.evaluation_images,
            self.world,
            classes=len(self.manifest.classes),
            pixels=pixels,
            batch=settings.batch,
            limit=0 if final else settings.interim_images,
            tta=final and settings.tta,
            precision=self.precision,
            turns=[round(speed) for speed in self.state.shares.relative],
            keep_going=keep_going,
        )

    def complete(self) -> dict[str, Any]:
        """Export the weights and write the summary, the last act of a run; collective. Returns the summary.

        Raises TrainingError where no node can keep them.
        """
        if self.outcome is None:  # resumed between the last checkpoint and here
            self.outcome = self.evaluate(self.plan.last_pixels, final=True, keep_going=lambda: True)
        return ending.end(self)

    def close(self) -> None:
        """Finish what is being written; not collective. Raises Superseded where another process has the run folder."""
        self.close_writer()
        self.display.close()

    def _record(self, record: dict[str, Any]) -> None:
        if not self.world.keeps:
            return
        try:
            self.folder.write_metrics(self.state.history)
        except TrainingError as error:  # the next epoch writes all lines again
            self.tell(f"{error}; training goes on")
        if not self.world.is_main:
            return
        prefixes = ("train_", *evaluated.PREFIXES.values())
        curves = {name.replace("_", "/", 1): value for name, value in record.items() if name.startswith(prefixes)}
        self.display.board.scalars(curves, self.state.step)
        if self.outcome:
            prefix = evaluated.PREFIXES[self.evaluated_word]
            about = self.evaluated, self.manifest.classes, prefix.strip("_")
            self.display.board.outcome(self.outcome, *about, self.state.step)
        self.display.write(epoch_line(record, self.config.epochs))

    def _tell_members(self) -> None:
        """Leave word who takes part, for node 0's supervisor and `k8scifar status`."""
        try:
            self.folder.write_members(self.state.members)
        except TrainingError as error:  # each attempt writes it again
            self.display.write(f"{error}; training goes on")

    def _on_device(self, split: packed.Split, border: int = 0) -> Images:
        images, labels = (torch.from_numpy(array).to(self.world.device) for array in (split.images, split.labels))
        return Images(images, labels, self.manifest.mean, self.manifest.std, border)

    def close_writer(self) -> tuple[int, int]:
        """Step and digest of the newest file that this rank has written; see checkpoint.Writer. Raises Superseded."""
        writer, self._writer = self._writer, None
        if writer:
            writer.close()
            self._written = writer.written
            if writer.late:
                raise writer.late
        return self._written
