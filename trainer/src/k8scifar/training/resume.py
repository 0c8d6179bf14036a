"""Before a run is opened: the ranks meet, and rank 0 alone finds out where the run goes on from."""

from __future__ import annotations

import json
import os
from typing import Any

from k8scifar import versions
from k8scifar.config.schema import Config
from k8scifar.console import say
from k8scifar.data import packed
from k8scifar.errors import TrainingError, UserError
from k8scifar.files import TRANSIENT
from k8scifar.ranks.agree import from_rank_0, meet
from k8scifar.ranks.world import World
from k8scifar.results import members, ownership
from k8scifar.results.run_folder import RunFolder
from k8scifar.training import checkpoint


def find(config: Config, manifest: packed.Manifest, world: World) -> tuple[dict[str, Any] | None, bytes | None]:
    """Meet the other ranks, then let rank 0 look at the run folder: (summary of a finished run, newest checkpoint).

    Collective; the same on all ranks. Raises UserError where ranks differ or the folder can't be used.
    """
    attempt = {"attempt": os.environ.get(members.ATTEMPT, "")}  # a rank of a former one belongs to nobody here
    meet(world, config.shared() | {"data": manifest.fingerprint} | _mathematics() | attempt)
    answer = from_rank_0(world, lambda: _look(RunFolder(config.run_dir), config, manifest))
    if answer is not None and answer[:1] == b"S":
        return json.loads(answer[1:]), None
    return None, answer[1:] if answer is not None else None


def _mathematics() -> dict[str, str]:
    """Versions that all ranks must have alike."""
    return {name: version for name, version in versions.versions().items() if name in ("k8scifar", "code", "torch")}


def _look(folder: RunFolder, config: Config, manifest: packed.Manifest) -> bytes | None:
    """Rank 0's part of `find`: b"S" + a summary, b"C" + a checkpoint, or None for a fresh run."""
    try:
        ownership.check_owner(folder.path, config.checkpoint.adopt)
        summary = folder.summary()
        if summary and folder.is_finished(summary, config, manifest):
            return b"S" + json.dumps(summary).encode()
        if folder.path.is_dir():
            ownership.take(folder.path, config.checkpoint.adopt)  # from here on nobody else writes in it
        bad = False
        for path, content, why in checkpoint.newest_good(folder.checkpoints):
            if content is None:
                say(f"{why}; trying the one before")
                bad = True
                continue
            folder.create(config)
            folder.forget_summary()
            say(f"resuming from {path}")
            return b"C" + content
    except OSError as error:
        kind = TrainingError if error.errno in TRANSIENT else UserError
        raise kind(f"{folder.path} can't be read: {error.strerror}; look at its owner and its volume") from None
    if summary:
        raise UserError(f"{folder.path} has a summary but no checkpoint to go on from; give the run another --name")
    if bad:
        raise UserError(
            f"no checkpoint in {folder.checkpoints} is whole; remove them to start anew, or use another --name"
        )
    folder.create(config)
    return None
