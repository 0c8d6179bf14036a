"""The run folder: what a run leaves behind, written by rank 0 alone.

``config.yaml`` (resolved), ``metrics.jsonl`` (a line an epoch), ``summary.json`` (the last thing written, so its
presence means done), ``model.safetensors``, ``report.html``, ``checkpoints/`` and TensorBoard's events.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import torch

from k8scifar import completion, model, optim, versions
from k8scifar.config import COMM, Config
from k8scifar.console import say
from k8scifar.data.packed import Manifest, Split
from k8scifar.errors import TrainingError, UserError
from k8scifar.evaluate import Outcome
from k8scifar.files import FULL, TRANSIENT, patiently, remove_temporary, unwritten, write_atomically
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
        """Make the folder and write the resolved configuration; what a killed rank 0 left half written goes.

        Raises UserError where that can't be done, TrainingError where the volume is full or fails.
        """
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            for folder in (self.path, self.checkpoints):
                remove_temporary(folder)
            write_atomically(self.path / "config.yaml", config.to_yaml().encode())
        except OSError as error:
            if error.errno in FULL and (self.path / "config.yaml").exists():
                say(unwritten(self.path / "config.yaml", error))
                return
            if error.errno in FULL | TRANSIENT:
                raise TrainingError(f"run folder {self.path} can't be written: {error.strerror}") from None
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
            return export(self.path / WEIGHTS, model)
        except OSError as error:
            raise TrainingError(unwritten(self.path / WEIGHTS, error)) from None

    def forget_summary(self) -> None:
        """Remove the mark: the run goes on. Raises OSError."""
        patiently(lambda: (self.path / completion.MARKER).unlink(missing_ok=True))

    def _write(self, name: str, text: str) -> None:
        try:
            write_atomically(self.path / name, text.encode())
        except OSError as error:
            raise TrainingError(unwritten(self.path / name, error)) from None


def summarise(state: State, plan: Plan, outcome: Outcome, precision: str, weights: str) -> dict[str, Any]:
    """What a finished run came to.

    Args:
        outcome: the last evaluation's.
        weights: sha256 of the exported weights.
    """
    figures, last = outcome.figures, state.history[-1]
    flops = sum(count * model.training_flops(state.net, pixels) for pixels, count in plan.pictures_at().items())
    flops += plan.steps * optim.step_flops(state.optimizer)
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
        "versions": versions.versions(),
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


def device_name(device: torch.device) -> str:
    """The name of what trains."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} thread(s)"


def mistakes(outcome: Outcome, split: Split) -> list[dict[str, Any]]:
    """The wrong pictures of the greatest loss: index in `split`, true and predicted class, loss."""
    labels = torch.as_tensor(split.labels)[outcome.samples]
    wrong = (outcome.predictions != labels).nonzero().squeeze(1)
    order = wrong[outcome.losses[wrong].argsort(descending=True)][:WORST]
    columns = (outcome.samples, labels, outcome.predictions, outcome.losses)
    names = ("picture", "true", "predicted", "loss")
    return [
        dict(zip(names, row, strict=True)) for row in zip(*(column[order].tolist() for column in columns), strict=True)
    ]
