"""One run's parts, put together: data, state, records. The loop in train.py uses them."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from k8scifar import checkpoint, model, parallel, records, report, trained, wire
from k8scifar.board import Board
from k8scifar.clock import StepClock
from k8scifar.config import Config
from k8scifar.data import packed
from k8scifar.data.augment import Pictures
from k8scifar.errors import TrainingError, UserError
from k8scifar.evaluate import Outcome, evaluate
from k8scifar.parallel import World
from k8scifar.plan import Plan
from k8scifar.progress import Progress
from k8scifar.state import State


class Session:
    """A run that is open on this rank. Opening is collective, and resumes the newest good checkpoint.

    Raises UserError where ranks, data, configuration and checkpoint do not fit each other.
    """

    def __init__(
        self, config: Config, manifest: packed.Manifest, plan: Plan, world: World, found: bytes | None
    ) -> None:
        self.config, self.manifest, self.world = config, manifest, world
        self.folder = records.RunFolder(config.run_dir)
        self.precision = parallel.resolve_precision(config, world)
        self.plan = plan
        self.splits = {name: packed.read(Path(config.data.dir), manifest, name) for name in packed.SPLITS}
        self.train_pictures = self._on_device("train", border=config.augment.translate)
        self.test_pictures = self._on_device("test")
        self.state = State.fresh(config, manifest, world, self.train_pictures)
        payload = checkpoint.decode(found, "the checkpoint") if found is not None else None
        why = self._choose_communication(payload)
        if payload:
            self.state.restore(payload)
        self.first_step = self.state.step
        self.agreement = parallel.Agreement(world, ("stop", "save", "bad"))
        self.clock = StepClock(world.device, running=world.leads)
        self.state.comm.mark = self.clock.mark
        self.progress = Progress(self.plan.steps, self.first_step, config.log.every_seconds, world.leads)
        show = world.leads and config.log.tensorboard
        self.board = Board(self.folder.path if show else None, self.first_step, self.progress.say)
        self.board.text("configuration", config.to_yaml())
        self._writer = None
        if world.leads:
            self._writer = checkpoint.Writer(self.folder.checkpoints, config.checkpoint.keep, self.progress.say)
        self._spent = self.state.history[-1]["seconds"] if self.state.history else 0.0
        self._started = self._epoch_started = self._saved = time.monotonic()
        self._stalled = 0.0  # seconds of this epoch that checkpoints have taken from the loop
        self.outcome: Outcome | None = None
        if world.size > 1:
            self.progress.say(f"communication: {self.state.comm.label}; {why}")
        self.progress.say(self.headline())

    def headline(self) -> str:
        """One line that tells what is about to train."""
        config, world = self.config, self.world
        resumed = f"; resuming at step {self.state.step}" if self.state.step else ""
        return (
            f"{config.name or config.recipe}: {config.model.name}, {model.parameters(self.state.net):,} parameters, "
            f"{self.manifest.counts['train']:,} + {self.manifest.counts['test']:,} pictures ({self.manifest.source}), "
            f"world size {world.size}, {world.device.type} {self.precision}, {world.backend}, "
            f"{torch.get_num_threads()} thread(s) a rank, global batch {config.global_batch}, "
            f"{config.epochs} epochs of {self.plan.steps_per_epoch} steps{resumed}"
        )

    @property
    def wants_checkpoint(self) -> bool:
        """On rank 0, whether the step about to be taken ends at the interval that the configuration asks for."""
        settings, step = self.config.checkpoint, self.state.step + 1
        at_step = bool(settings.every_steps) and step % settings.every_steps == 0
        is_old = bool(settings.every_seconds) and time.monotonic() - self._saved > settings.every_seconds
        return self.world.leads and (at_step or is_old) and step % self.plan.steps_per_epoch > 0

    def save(self, must: bool = False) -> None:
        """Hand a checkpoint of the present state to the writer; collective. Raises UserError where it holds garbage.

        A volume that is still busy with former ones makes it leave this one out, unless it `must` be written.
        """
        begun, state = time.monotonic(), self.state
        behind = torch.tensor([bool(self._writer and self._writer.behind)])
        facts = parallel.gather(torch.cat([state.sums.cpu(), state.weight_sum(), behind.double()]), self.world)
        self.check_finite(facts, state.step)
        if facts[0, -1] and not must:
            self.progress.say(f"checkpoint of step {state.step} left out: the volume is still busy with former ones")
        else:
            payload = state.snapshot(self.plan.pixels(max(0, state.step - 1)))
            if self._writer:
                self._writer.save(payload, state.step, best_step(state.history))
        self._saved = time.monotonic()
        self._stalled += self._saved - begun

    def check_finite(self, sums: torch.Tensor, step: int) -> None:
        """Raise UserError, naming step, learning rate and last good checkpoint, where losses or weights are garbage."""
        if torch.isfinite(sums).all():
            return
        files = checkpoint.listed(self.folder.checkpoints) if self.world.leads else []
        good = f"the last good checkpoint is {files[0]}" if files else "there is no checkpoint before it"
        raise UserError(
            f"loss or weights are not finite at step {step} (epoch {step / self.plan.steps_per_epoch:.2f}, learning "
            f"rate {self.plan.lr(step - 1):.4g}); {good}; lower optimizer.lr or lengthen schedule.warmup"
        )

    @property
    def epoch_is_over(self) -> bool:
        """Whether an epoch's last step is done and its end (evaluation, record) is not."""
        return self.state.step == (len(self.state.history) + 1) * self.plan.steps_per_epoch

    def finish_epoch(self, keep_going) -> None:
        """Average the statistics, evaluate if due, record the epoch; collective.

        Raises evaluate.Stopped where `keep_going` ends the evaluation; the epoch is then still to be finished.
        """
        state, step = self.state, self.state.step
        epoch, final = step // self.plan.steps_per_epoch, step == self.plan.steps
        seconds = time.monotonic() - self._epoch_started
        sums = state.sums.clone()
        dist.all_reduce(sums)
        self.check_finite(sums, step)
        parallel.average(state.statistics(), self.world)
        pixels = self.plan.pixels(step - 1)
        record: dict[str, Any] = {
            "epoch": epoch,
            "step": step,
            "pixels": pixels,
            "lr": self.plan.lr(step - 1),
            "train_loss": (sums[0] / sums[2]).item(),
            "train_accuracy": (sums[1] / sums[2]).item(),
        }
        every = self.config.evaluation.every_epochs
        if final or (every and epoch % every == 0):
            self.outcome = self.evaluate(pixels, final, keep_going)
            record |= {f"test_{key}": value for key, value in self.outcome.figures.items() if key != "per_class"}
        steps_here = step - max(self.first_step, step - self.plan.steps_per_epoch)
        record["images_per_second"] = round(steps_here * self.config.global_batch / max(seconds, 1e-9), 1)
        record["seconds"] = round(self._spent + time.monotonic() - self._started, 1)
        record["checkpoint_seconds"], self._stalled = round(self._stalled, 3), 0.0
        state.history.append(record)
        state.sums.zero_()
        self._record(record)
        self._epoch_started = time.monotonic()

    def evaluate(self, pixels: int, final: bool, keep_going) -> Outcome:
        """Evaluate the weights, or their average where there is one; the last time on all pictures, with TTA."""
        settings, average = self.config.evaluation, self.state.average
        if average:
            average.swap()
        try:
            return evaluate(
                self.state.net,
                self.test_pictures,
                self.world,
                classes=len(self.manifest.classes),
                pixels=pixels,
                batch=settings.batch,
                limit=0 if final else settings.interim_images,
                tta=settings.tta and final,
                precision=self.precision,
                keep_going=keep_going,
            )
        finally:
            if average:
                average.swap()

    def complete(self) -> dict[str, Any]:
        """Export the weights and write the summary, the last act of a run; collective. Returns rank 0's summary."""
        if self.outcome is None:  # resumed between the last checkpoint and here
            self.outcome = self.evaluate(self.plan.last_pixels, final=True, keep_going=lambda: True)
        summary = parallel.lead(self.world, self._finish)  # nobody leaves before the mark of the finished run is there
        return json.loads(summary or b"{}")

    def _finish(self) -> bytes:
        """Rank 0's last act: write what the run came to; a full disk gets some time. Raises TrainingError."""
        self._close_writer()
        state, config, manifest = self.state, self.config, self.manifest
        if state.average:
            state.average.swap()
        model_file = trained.Trained(
            state.net, config.model, manifest.classes, manifest.mean, manifest.std, self.plan.last_pixels
        )
        end = time.monotonic() + 0.8 * parallel.PATIENCE * self.world.timeout
        while True:
            try:
                weights = self.folder.export(model_file)
                summary = records.summarise(state, self.plan, self.outcome, self.precision, weights)
                summary["mistakes"] = records.mistakes(self.outcome, self.splits["test"])
                report.attempt(self.folder.path, summary, self.splits["test"], self.progress.say, self.world.timeout)
                self.folder.write_summary(summary)
                break
            except TrainingError as error:
                if time.monotonic() > end:
                    raise
                self.progress.say(f"{error}; trying again")
                time.sleep(5.0)
        self.board.text("summary", json.dumps(summary, indent=1))
        self.progress.say(records.describe(summary, self.folder.path))
        return json.dumps(summary).encode()

    def close(self) -> None:
        """Finish what is being written; not collective."""
        self._close_writer()
        self.board.close()
        self.progress.close()

    def _choose_communication(self, payload: dict[str, Any] | None) -> str:
        """Settle how the ranks communicate, before the state is restored; collective. Returns why it is so."""
        config, world, state, step = self.config, self.world, self.state, payload["step"] if payload else 0
        same_size = payload and payload["world_size"] == world.size
        kept = payload["comm"] if same_size and "comm" in payload else None

        def measure() -> wire.Times:
            count = config.global_batch // config.micro_batch // world.size
            samples = torch.arange(config.micro_batch, device=world.device) % len(self.train_pictures)
            pictures = self.train_pictures.plain(samples, self.plan.pixels(step))
            labels = self.train_pictures.labels[samples]
            return wire.measure(state.ddp, state.optimizer, pictures, labels, count, self.precision, world)

        choice, why = wire.choose(config, world, kept, model.parameters(state.net), measure)
        state.communicate(choice.mode, choice.every)
        return why

    def _record(self, record: dict[str, Any]) -> None:
        if not self.world.leads:
            return
        try:
            self.folder.write_metrics(self.state.history)
        except TrainingError as error:  # the next epoch writes all lines again
            self.progress.say(f"{error}; training goes on")
        curves = {
            name.replace("_", "/", 1): value for name, value in record.items() if name.startswith(("train_", "test_"))
        }
        self.board.scalars(curves, self.state.step)
        if self.outcome:
            self.board.outcome(self.outcome, self.splits["test"], self.manifest.classes, self.state.step)
        self.progress.say(records.epoch_line(record, self.config.epochs))

    def _on_device(self, name: str, border: int = 0) -> Pictures:
        split = self.splits[name]
        images, labels = (torch.from_numpy(array).to(self.world.device) for array in (split.images, split.labels))
        return Pictures(images, labels, self.manifest.mean, self.manifest.std, border)

    def _close_writer(self) -> None:
        if self._writer:
            self._writer.close()
            self._writer = None


def best_step(history: list[dict[str, Any]]) -> int | None:
    """The step of the epoch with the highest test accuracy so far, None before the first evaluation."""
    scored = [record for record in history if "test_accuracy" in record]
    return max(scored, key=lambda record: record["test_accuracy"])["step"] if scored else None
