"""Checkpoints on disk: whole or not at all, checked before use, safe to load.

A file ``step-00000400-<digest>.pt`` is torch.save's of plain values and tensors; its name carries the first 16 hex
digits of its content's sha256, so one rename makes it valid and one read proves it. It loads with weights_only=True: a
hostile file can't run code. Files are written by a thread from a copy in memory; training does not wait for the disk.
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
    """A checkpoint file that is torn, altered or no checkpoint; the text says which."""


def load(path: Path) -> Payload:
    """Read one checkpoint file. Raises Damaged, or OSError where it can't be read."""
    return decode(read_verified(path), path)


def read_verified(path: Path) -> bytes:
    """The file's bytes, checked against the digest in its name, if that is of our form. Raises Damaged, OSError."""
    content = files.read(path)
    named = _NAME.fullmatch(path.name)
    if not content:
        raise Damaged(f"{path} is empty")
    if named and _digest(content) != named[2]:
        raise Damaged(f"{path} is damaged: its sha256 is not the one in its name")
    return content


def decode(content: bytes, path: Path | str) -> Payload:
    """A checkpoint's values from its bytes. Raises Damaged."""
    try:
        payload = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for what is no checkpoint
        raise Damaged(f"{path} is no checkpoint that loads safely ({type(error).__name__})") from None
    if not isinstance(payload, dict) or payload.get("format") != FORMAT:
        raise Damaged(f"{path} is no K8sCIFAR checkpoint of format {FORMAT}")
    return payload


def encode(payload: Payload) -> bytes:
    """A checkpoint's bytes: the same for the same values, on whatever node they were computed."""
    buffer = io.BytesIO()
    torch.save(_interned(payload | {"format": FORMAT}), buffer)
    return buffer.getvalue()


def _interned(tree: Any) -> Any:
    """Nested values in which equal texts are one object: pickle writes a text that it meets again as a reference."""
    if isinstance(tree, str):
        return sys.intern(str(tree))
    if isinstance(tree, dict):
        return {_interned(key): _interned(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_interned(value) for value in tree]
    return tuple(_interned(value) for value in tree) if type(tree) is tuple else tree


def listed(folder: Path) -> list[Path]:
    """Checkpoint files of a folder, newest first; none where there is no such folder. Raises OSError."""
    found = [(int(match[1]), name) for name in files.names(folder) if (match := _NAME.fullmatch(name))]
    return [folder / name for _, name in sorted(found, reverse=True)]


def newest_good(folder: Path) -> Iterator[tuple[Path, bytes | None, str]]:
    """Walk the checkpoints, newest first: (path, content, "") of a good one, (path, None, why) of a damaged one.

    Raises OSError where the folder can't be read, and at the end of the walk where a file could not be.
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
    """What to say of ranks whose newest files are of one step and differ; "" where replicas are equal, as they should.

    `written`: each rank's Writer.written.
    """
    step = max(step for step, _ in written)
    digests = {rank: digest for rank, (own, digest) in enumerate(written) if own == step}
    if not step or len(set(digests.values())) == 1:
        return ""
    told = ", ".join(f"{digest:012x} is rank {rank}'s" for rank, digest in digests.items())
    return f"their checkpoints of step {step} differ ({told})"


def is_named(name: str) -> bool:
    """Whether this is the name of a checkpoint file."""
    return bool(_NAME.fullmatch(name))


def file_name(step: int, content: bytes) -> str:
    """The name of a checkpoint file."""
    return f"step-{step:08d}-{_digest(content)}.pt"


class Writer:
    """Writes checkpoints in the background, keeps the newest `keep` and the best one, removes the others.

    A write that fails (a full disk) is told through `warn`, leaves the older files as they are, and training goes on.
    `before` is called just before a file is renamed into place; what it raises as Superseded is kept in `late`.
    """

    def __init__(self, folder: Path, keep: int, warn, before: Callable[[], None] = lambda: None) -> None:
        self._folder, self._keep, self._warn, self._before = folder, keep, warn, before
        self.written = (0, 0)  # step and digest, as a number of 48 bits, of the newest that is safe
        self.late: Superseded | None = None
        self._jobs: queue.Queue[tuple[Payload, int, Sequence[int]] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._work, name="checkpoint-writer", daemon=True)
        self._thread.start()

    def save(self, payload: Payload, step: int, best_first: Sequence[int] = ()) -> None:
        """Hand over a payload that nobody changes any more; never blocks.

        Args:
            payload: plain values and CPU tensors.
            step: optimiser steps done.
            best_first: the evaluated steps; the first one that has a checkpoint is kept.
        """
        self._jobs.put((payload, step, best_first))

    @property
    def behind(self) -> bool:
        """Whether the disk is so slow that a payload still waits while the one before it is being written."""
        return not self._jobs.empty()

    def close(self) -> None:
        """Finish what was handed over."""
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
            except Exception as error:  # whatever it is, the next one may be written
                self._warn(f"{files.unwritten(f'checkpoint of step {step}', error)}; training goes on")
                continue
            try:
                self._prune(path, best_first)
            except OSError as error:
                self._warn(f"old checkpoints in {self._folder} could not be removed ({error.strerror})")

    def _prune(self, newest: Path, best_first: Sequence[int]) -> None:
        """Remove what is neither newest nor best; only called once `newest` is safe. Raises OSError."""
        older = [path for path in listed(self._folder) if step_of(path) <= step_of(newest)]
        there = {step_of(path) for path in older}
        best = next((step for step in best_first if step in there), None)  # an epoch may have left no checkpoint
        for path in older[self._keep :]:
            if step_of(path) != best:
                files.patiently(lambda path=path: path.unlink(missing_ok=True))


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
