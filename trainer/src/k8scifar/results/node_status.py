"""What each node's supervisor is doing, for `k8scifar status`: one small JSON file a node beside the run folders."""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path
from typing import Any

from k8scifar.files import write_atomically


def folder(run_dir: Path) -> Path:
    """Where the nodes of a run leave their notes: beside the run folder, which is rank 0's alone."""
    return run_dir.parent / ".nodes" / run_dir.name


def write(run_dir: Path, node: int, state: str, reason: str = "", attempt: int = 0, alone: bool = False) -> None:
    """Note a node's state: waiting, training, failed, stopped or done. A failing volume must not end the training.

    `alone`: the other nodes have folders of their own, and leave their notes there.
    """
    note = {
        "state": state,
        "reason": reason,
        "attempt": attempt,
        "time": time.time(),
        "pod": os.environ.get("POD_NAME", ""),
        "alone": alone,
    }
    with contextlib.suppress(OSError):
        folder(run_dir).mkdir(parents=True, exist_ok=True)
        write_atomically(folder(run_dir) / f"{node}.json", json.dumps(note).encode())


def read(run_dir: Path) -> dict[int, dict[str, Any]]:
    """Node -> its last note; damaged ones are left out."""
    notes = {}
    with contextlib.suppress(OSError):
        for path in folder(run_dir).glob("[0-9]*.json"):
            with contextlib.suppress(OSError, ValueError):
                note = json.loads(path.read_text())
                if isinstance(note, dict):
                    notes[int(path.stem)] = note
    return dict(sorted(notes.items()))
