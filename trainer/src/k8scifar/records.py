"""The run folder: what a run leaves behind, written by rank 0 alone.

``config.yaml`` (resolved), ``metrics.jsonl`` (a line an epoch), ``summary.json`` (the last thing written, so its
presence means done), ``model.safetensors``, ``checkpoints/`` and TensorBoard's events.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

import k8scifar
from k8scifar import completion, model
from k8scifar.config import COMM, Config
from k8scifar.data.packed import Manifest, Split
from k8scifar.errors import TrainingError, UserError
from k8scifar.evaluate import Outcome
from k8scifar.files import write_atomically
from k8scifar.plan import Plan
from k8scifar.state import State
from k8scifar.trained import WEIGHTS, Trained, export

WORST = 32  # mistakes shown


class RunFolder:
    """The files of one run. A rank other than 0 makes none and writes nothing."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"

    def create(self, config: Config) -> None:
        """Make the folder and write the resolved configuration. Raises UserError where that can't be done."""
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path / "config.yaml", config.to_yaml().encode())
        except OSError as error:
            raise UserError(
                f"run folder {self.path} can't be written: {error.strerror}; check its owner and the free space, "
                "or choose another --runs-dir"
            ) from None

    def summary(self) -> dict[str, Any] | None:
        """The summary of a finished run, None where there is none that can be read."""
        return completion.summary(self.path)

    def write_metrics(self, history: list[dict[str, Any]]) -> None:
        """Write metrics.jsonl anew: after a resume it holds each epoch once. Raises TrainingError."""
        self._write("metrics.jsonl", "".join(json.dumps(record) + "\n" for record in history))

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Write summary.json, the mark of a finished run. Raises TrainingError."""
        self._write(completion.MARKER, json.dumps(summary, indent=1) + "\n")

    def is_finished(self, summary: dict[str, Any], config: Config, manifest: Manifest) -> bool:
        """Whether a run with this summary has nothing left to do; False if `config` asks for more epochs.

        Raises UserError where it was finished with another configuration or on other data.
        """
        if summary["data"]["fingerprint"] != manifest.fingerprint:
            raise UserError(
                f"run {self.path} is finished on other data ({summary['data']['source']}), and this is "
                f"{manifest.source}; give the new run another --name"
            )
        odd = {key: both for key, both in config.differences(summary["identity"]).items() if key != "epochs"}
        if odd and not config.checkpoint.accept_changes:
            told = "; ".join(f"{key} {before} -> {value}" for key, (before, value) in odd.items())
            raise UserError(
                f"run {self.path} is finished with another configuration ({told}); give the new run another --name"
            )
        return config.epochs <= summary["epochs"]

    def export(self, model: Trained) -> str:
        """Write the weights for others to use; returns the file's sha256. Raises TrainingError."""
        try:
            export(self.path / WEIGHTS, model)
            return hashlib.sha256((self.path / WEIGHTS).read_bytes()).hexdigest()
        except OSError as error:
            raise TrainingError(f"{self.path / WEIGHTS} could not be written: {error.strerror}; free space") from None

    def forget_summary(self) -> None:
        """Remove the mark: the run goes on."""
        (self.path / completion.MARKER).unlink(missing_ok=True)

    def _write(self, name: str, text: str) -> None:
        try:
            write_atomically(self.path / name, text.encode())
        except OSError as error:
            raise TrainingError(f"{self.path / name} could not be written: {error.strerror}; free space") from None


class Board:
    """TensorBoard's events; without TensorBoard every method does nothing. A failing disk never stops training."""

    def __init__(self, folder: Path | None, step: int) -> None:
        self._writer = None
        if folder is not None:
            from torch.utils.tensorboard import SummaryWriter

            # Points of a former attempt beyond this step are dropped by TensorBoard.
            self._writer = SummaryWriter(str(folder), purge_step=step, flush_secs=30)

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Add a point to each named curve."""
        if self._writer:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def step(self, step: int, loss: float, lr: float, images_per_second: float, seconds: dict[str, float]) -> None:
        """Add a point to the step curves; `seconds`: where the time since the last point went, shown as shares."""
        total = sum(seconds.values()) or 1.0
        shares = {f"time/{part}": value / total for part, value in seconds.items()}
        self.scalars({"step/loss": loss, "step/lr": lr, "step/images_per_second": images_per_second} | shares, step)

    def text(self, name: str, text: str) -> None:
        """Add a text, shown as code."""
        if self._writer:
            self._writer.add_text(name, "\n".join(f"    {line}" for line in text.splitlines()))

    def inputs(self, batch: torch.Tensor, manifest: Manifest, step: int) -> None:
        """Add a grid of augmented inputs, normalised [n, 3, h, w]."""
        if self._writer:
            from k8scifar import figures

            self._writer.add_image("inputs", figures.grid(batch[:32], manifest.mean, manifest.std), step)

    def outcome(self, outcome: Outcome, split: Split, classes: list[str], step: int) -> None:
        """Add an evaluation's confusion matrix and worst mistakes, and flush."""
        if self._writer:
            from k8scifar import figures

            self._writer.add_figure("test/confusion", figures.confusion(outcome.confusion, classes), step)
            at, titles = worst(outcome, split, classes)
            self._writer.add_figure("test/worst_mistakes", figures.mistakes(split.images[at], titles), step)
            self._writer.flush()

    def close(self) -> None:
        """Flush and close."""
        if self._writer:
            self._writer.close()


def summarise(state: State, plan: Plan, outcome: Outcome, precision: str, weights: str) -> dict[str, Any]:
    """What a finished run came to.

    Args:
        outcome: the last evaluation's.
        weights: sha256 of the exported weights.
    """
    figures, last = outcome.figures, state.history[-1]
    flops = sum(count * model.training_flops(state.net, pixels) for pixels, count in plan.pictures_at().items())
    return {
        "accuracy": figures["accuracy"],
        "accuracy_tta": figures.get("accuracy_tta"),
        "top5": figures["top5"],
        "loss": figures["loss"],
        "per_class": dict(zip(state.manifest.classes, figures["per_class"], strict=True)),
        "confusion": outcome.confusion.tolist(),
        "test_pictures": figures["pictures"],
        "epochs": plan.config.epochs,
        "steps": plan.steps,
        "world_size": state.world.size,
        "device": device_name(state.world.device),
        "precision": precision,
        "global_batch": plan.config.global_batch,
        "images_per_second": statistics.median(record["images_per_second"] for record in state.history),
        "seconds": last["seconds"],
        "parameters": model.parameters(state.net),
        "training_flops": flops,
        "data": {"source": state.manifest.source, "fingerprint": state.manifest.fingerprint},
        "weights_sha256": weights,
        "config_fingerprint": plan.config.fingerprint(),
        "identity": plan.config.identity() | {COMM: state.comm.name if state.world.size > 1 else "auto"},
        "versions": versions(),
    }


def describe(summary: dict[str, Any], folder: Path) -> str:
    """A finished run in one line."""
    tta = f", with flip TTA {summary['accuracy_tta']:.2%}" if summary["accuracy_tta"] is not None else ""
    return (
        f"test accuracy {summary['accuracy']:.2%}{tta} after {summary['epochs']} epochs, {summary['seconds']:.0f} s, "
        f"{summary['training_flops'] / 1e15:.3f} PFLOP, {summary['images_per_second']:,.0f} images/s on "
        f"{summary['world_size']} rank(s); see {folder}"
    )


def epoch_line(record: dict[str, Any], epochs: int) -> str:
    """An epoch's record in one line."""
    test = ""
    if "test_accuracy" in record:
        test = f", test accuracy {record['test_accuracy']:.2%} loss {record['test_loss']:.4f}"
        test += f" ({record['test_pictures']:,} pictures)"
    return (
        f"epoch {record['epoch']}/{epochs}: train loss {record['train_loss']:.4f} accuracy "
        f"{record['train_accuracy']:.2%}{test}, {record['pixels']} pixels, {record['images_per_second']:,.0f} images/s"
    )


def say(text: str) -> None:
    """A line on stderr; for rank 0 before a progress bar exists."""
    print(text, file=sys.stderr, flush=True)


def device_name(device: torch.device) -> str:
    """The name of what trains."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} thread(s)"


def worst(outcome: Outcome, split: Split, classes: list[str]) -> tuple[list[int], list[str]]:
    """The wrong pictures of the greatest loss: indices into `split`, and "true > predicted" of each."""
    labels = torch.as_tensor(split.labels)[outcome.samples]
    wrong = (outcome.predictions != labels).nonzero().squeeze(1)
    order = wrong[outcome.losses[wrong].argsort(descending=True)][:WORST]
    titles = [f"{classes[labels[at]]} > {classes[outcome.predictions[at]]}" for at in order.tolist()]
    return outcome.samples[order].tolist(), titles


def versions() -> dict[str, str]:
    """Versions of what decides a result."""
    found = {"k8scifar": k8scifar.__version__, "torch": torch.__version__, "python": platform.python_version()}
    return found | {"machine": platform.machine(), "system": platform.system()}


def touch_heartbeat() -> None:
    """Tell the orchestrator's liveness probe that training moves: touch the file K8SCIFAR_HEARTBEAT names, if any."""
    path = os.environ.get("K8SCIFAR_HEARTBEAT")
    if path:
        with contextlib.suppress(OSError):  # a full disk must not end the training
            Path(path).touch()
