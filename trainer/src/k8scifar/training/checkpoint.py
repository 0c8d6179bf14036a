"""Checkpoint files: written atomically, verified before use, safe to load.

torch.save writes plain values and tensors to ``step-00000400-<digest>.pt``. The digest is the first 16 hex digits of
the content's sha256: one rename makes a file valid, and one read verifies it. It loads with weights_only=True, so that
a hostile file can't run code. A thread writes files from a copy in memory; training does not wait for the disk.
"""

from __future__ import annotations

import hashlib
import io
import queue
import re
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from k8scifar import files
from k8scifar.errors import Superseded, UserError

FORMAT = 1
_NAME = re.compile(r"step-(\d{8,})-([0-9a-f]{16})\.pt")

Payload = dict[str, Any]


class Damaged(Exception):
    """A checkpoint file is incomplete, altered, or not a checkpoint; the text has which of them."""


def load(path: Path) -> Payload:
    """Read one checkpoint file. Raises Damaged, or OSError where it can't be read."""
    return decode(read_verified(path), path)


def read_verified(path: Path) -> bytes:
    """Read a file and verify it against the digest in its name, if there is one. Raises Damaged, OSError."""
    content = files.read(path)
    named = _NAME.fullmatch(path.name)
    if not content:
        raise Damaged(f"{path} is empty")
    if named and _digest(content) != named[2]:
        raise Damaged(f"{path} is damaged: its sha256 is not the one in its name")
    return content


def decode(content: bytes, path: Path | str) -> Payload:
    """Load a checkpoint's values from its bytes. Raises Damaged."""
    try:
        payload = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for files that are not checkpoints
        raise Damaged(f"{path} is no checkpoint that loads safely ({type(error).__name__})") from None
    if not isinstance(payload, dict) or payload.get("format") != FORMAT:
        raise Damaged(f"{path} is no K8sCIFAR checkpoint of format {FORMAT}")
    return payload


def encode(payload: Payload) -> bytes:
    """Encode a checkpoint; equal values give equal bytes on every node."""
    buffer = io.BytesIO()
    torch.save(_interned(payload | {"format": FORMAT}), buffer)
    return buffer.getvalue()


def _interned(tree: Any) -> Any:
    """Make equal strings in nested values one object, because pickle writes repeated objects as references."""
    if isinstance(tree, str):
        return sys.intern(str(tree))
    if isinstance(tree, dict):
        return {_interned(key): _interned(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_interned(value) for value in tree]
    return tuple(_interned(value) for value in tree) if type(tree) is tuple else tree


def listed(folder: Path) -> list[Path]:
    """The checkpoint files of a folder, newest first; none if the folder does not exist. Raises OSError."""
    found = [(int(match[1]), name) for name in files.names(folder) if (match := _NAME.fullmatch(name))]
    return [folder / name for _, name in sorted(found, reverse=True)]


def newest_good(folder: Path) -> Iterator[tuple[Path, bytes | None, str]]:
    """Yield each checkpoint, newest first: (path, content, "") if it is good, (path, None, reason) if it is damaged.

    Raises OSError if the folder can't be read, and after the last checkpoint if a file could not be read.
    """
    trouble = None
    for path in listed(folder):
        try:
            content = read_verified(path)
            decode(content, path)
            yield path, content, ""
        except Damaged as damage:
            yield path, None, str(damage)
        except OSError as error:
            trouble = error
            yield path, None, f"{path} can't be read: {error.strerror}"
    if trouble:
        raise trouble


def step_of(path: Path | str) -> int:
    """The step in a checkpoint's file name."""
    match = _NAME.fullmatch(Path(path).name)
    if not match:
        raise UserError(f"{path} is not named like a checkpoint (step-<number>-<digest>.pt)")
    return int(match[1])


def differing(written: list[tuple[int, int]]) -> str:
    """Describe how the ranks' newest checkpoints of one step differ; "" if they are equal, as they should be.

    `written`: each rank's Writer.written.
    """
    step = max(step for step, _ in written)
    digests = {rank: digest for rank, (own, digest) in enumerate(written) if own == step}
    if not step or len(set(digests.values())) == 1:
        return ""
    listing = ", ".join(f"{digest:012x} is rank {rank}'s" for rank, digest in digests.items())
    return f"their checkpoints of step {step} differ ({listing})"


def is_named(name: str) -> bool:
    """Whether this is the name of a checkpoint file."""
    return bool(_NAME.fullmatch(name))


def file_name(step: int, content: bytes) -> str:
    """The name of a checkpoint file."""
    return f"step-{step:08d}-{_digest(content)}.pt"


class Writer:
    """Write checkpoints in the background, keep the newest `keep` and the best one, remove the others.

    A write that fails (a full disk) is logged through `warn`; the older files stay, and training goes on. `before` is
    called just before a file is renamed into place. If it raises Superseded, that is stored in `late`.
    """

    def __init__(self, folder: Path, keep: int, warn, before: Callable[[], None] = lambda: None) -> None:
        self._folder, self._keep, self._warn, self._before = folder, keep, warn, before
        self.written = (0, 0)  # step, and 48 bits of the digest, of the newest file on the disk
        self.late: Superseded | None = None
        self._jobs: queue.Queue[tuple[Payload, int, Sequence[int]] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._work, name="checkpoint-writer", daemon=True)
        self._thread.start()

    def save(self, payload: Payload, step: int, best_first: Sequence[int] = ()) -> None:
        """Queue a payload, which must not change any more; returns at once.

        Args:
            payload: plain values and CPU tensors.
            step: optimiser steps done.
            best_first: the evaluated steps, best first; the first one that has a checkpoint is kept.
        """
        self._jobs.put((payload, step, best_first))

    @property
    def behind(self) -> bool:
        """Whether a payload still waits in the queue because the disk is slow."""
        return not self._jobs.empty()

    def close(self) -> None:
        """Write what is queued, and stop the thread."""
        self._jobs.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            payload, step, best_first = job
            try:
                content = encode(payload)
                path = self._folder / file_name(step, content)
                files.write_atomically(path, content, before=self._before)
                self.written = (step, int(_digest(content)[:12], 16))
            except Superseded as error:
                self.late = error
                continue
            except Exception as error:  # of any type: the next write may succeed
                self._warn(f"{files.unwritten(f'checkpoint of step {step}', error)}; training goes on")
                continue
            try:
                self._prune(path, best_first)
            except OSError as error:
                self._warn(f"old checkpoints in {self._folder} could not be removed ({error.strerror})")

    def _prune(self, newest: Path, best_first: Sequence[int]) -> None:
        """Remove the files that are neither newest nor best, after `newest` is on the disk. Raises OSError."""
        older = [path for path in listed(self._folder) if step_of(path) <= step_of(newest)]
        there = {step_of(path) for path in older}
        best = next((step for step in best_first if step in there), None)  # not every epoch has one
        for path in older[self._keep :]:
            if step_of(path) != best:
                files.patiently(lambda path=path: path.unlink(missing_ok=True))


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
