"""The summary of a finished run: its presence in the run folder means done."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from k8scifar.config.schema import Config
from k8scifar.results import participants
from k8scifar.results.evaluated import word_of

MARKER = "summary.json"
RENAMED = {"test_pictures": "test_images", "picture": "image"}


def read_summary(run_dir: Path) -> dict | None:
    """The run's summary, which the trainer writes as its very last act; None while there is no whole one."""
    try:
        values = json.loads((run_dir / MARKER).read_text())
    except (OSError, ValueError):
        return None
    return with_todays_names(values) if isinstance(values, dict) else None


def with_todays_names(record: dict[str, Any]) -> dict[str, Any]:
    """A record of a run (summary, epoch) under today's keys: version 0.1 said pictures where others say images."""
    renamed = {RENAMED.get(key, key): value for key, value in record.items()}
    if isinstance(renamed.get("mistakes"), list):
        renamed["mistakes"] = [
            {RENAMED.get(key, key): value for key, value in each.items()} for each in renamed["mistakes"]
        ]
    return renamed


def finished_summary(config: Config) -> dict | None:
    """The summary of a run that has trained all the epochs this configuration asks for, else None."""
    found = read_summary(config.run_dir)
    epochs = found.get("epochs") if found else None
    return found if isinstance(epochs, int) and epochs >= config.epochs else None


def newest_checkpoint(run_dir: Path) -> str:
    """Name of the newest checkpoint file; empty where there is none that can be seen."""
    try:
        return max((name for name in os.listdir(run_dir / "checkpoints") if name.endswith(".pt")), default="")
    except OSError:
        return ""


def beside(record: dict[str, Any]) -> str:
    """What belongs beside an accuracy of this record (summary, epoch): that its images are synthetic, if they are."""
    source = record.get("data") or ""
    source = source.get("source", "") if isinstance(source, dict) else source
    return " on SYNTHETIC images" if str(source).startswith("synthetic") else ""


def augmented(figures: dict[str, Any]) -> str:
    """The accuracies with test-time augmentation among these figures, to follow the plain one; "" without any."""
    words = {"accuracy_tta": "flip TTA", "accuracy_tta_shifts": "flips and shifts"}
    return "".join(f", with {what} {figures[key]:.2%}" for key, what in words.items() if figures.get(key) is not None)


def describe(summary: dict[str, Any], folder: Path) -> str:
    """A finished run in one line."""
    return (
        f"{word_of(summary)} accuracy {summary['accuracy']:.2%}{beside(summary)}{augmented(summary)} "
        f"after {summary['epochs']} epochs, {summary['seconds']:.0f} s, "
        f"{summary['training_flops'] / 1e15:.3f} PFLOP, {summary['images_per_second']:,.0f} images/s on "
        f"{summary['world_size']} rank(s){_took_part(summary)}; see {folder}"
    )


def _took_part(summary: dict[str, Any]) -> str:
    """Who took part from which step to which, where that changed."""
    told = participants.told(summary.get("members", []))
    return (
        f" at the end; {', '.join(told) if len(told) < 6 else f'{len(told) - 1} times others took part'}"
        if told
        else ""
    )
