"""The run folder: what a run leaves behind, written by rank 0, or by the first rank of each node with its own folders.

``config.yaml`` (resolved), ``metrics.jsonl`` (a line an epoch), ``summary.json`` (the last thing written, so its
presence means done), ``model.safetensors``, ``report.html``, ``members.json``, ``checkpoints/`` and, from rank 0 alone,
TensorBoard's events.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from k8scifar.config.schema import Config
from k8scifar.console import say
from k8scifar.data.packed import Manifest
from k8scifar.errors import TrainingError, UserError
from k8scifar.files import FULL, TRANSIENT, make_folder, patiently, remove_temporary, unwritten, write_atomically
from k8scifar.results import lease, ownership, participants, weights
from k8scifar.results.summary import MARKER, read_summary


class RunFolder:
    """The files of one run. Ranks that do not keep a run folder (`World.keeps`) write nothing in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"

    def create(self, config: Config) -> None:
        """Make the folder and write the resolved configuration; what a killed rank 0 left half written goes.

        Raises UserError where that can't be done or another training has the folder, TrainingError where the volume
        is full or fails.
        """
        try:
            make_folder(self.path)
            ownership.take(self.path, config.checkpoint.adopt)
            make_folder(self.checkpoints)
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

    def check(self) -> None:
        """Raise Superseded where another process has taken over the folder since; asked before each write."""
        lease.check(self.path)

    def summary(self) -> dict[str, Any] | None:
        """The summary of a finished run, None where there is none that can be read."""
        return read_summary(self.path)

    def write_metrics(self, history: list[dict[str, Any]]) -> None:
        """Write the whole of metrics.jsonl: after a resume, too, it holds each epoch once. Raises TrainingError."""
        self._write("metrics.jsonl", "".join(json.dumps(record) + "\n" for record in history))

    def write_members(self, present: list[participants.Members]) -> None:
        """Write members.json, who takes part. Raises TrainingError."""
        self._write(participants.FILE, participants.content(self.path, present) + "\n")

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Write summary.json, the mark of a finished run. Raises TrainingError."""
        self._write(MARKER, json.dumps(summary, indent=1) + "\n")

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

    def export(self, tensors: dict[str, torch.Tensor], about: dict[str, Any]) -> str:
        """Write the weights for others to use (as `weights.write`); returns the file's sha256. Raises TrainingError."""
        path = self.path / weights.WEIGHTS
        try:
            self.check()
            return weights.write(path, tensors, about)
        except OSError as error:
            raise TrainingError(unwritten(path, error)) from None

    def forget_summary(self) -> None:
        """Remove the mark: the run goes on. Raises OSError."""
        patiently(lambda: (self.path / MARKER).unlink(missing_ok=True))

    def _write(self, name: str, text: str) -> None:
        try:
            write_atomically(self.path / name, text.encode(), before=self.check)
        except OSError as error:
            raise TrainingError(unwritten(self.path / name, error)) from None
