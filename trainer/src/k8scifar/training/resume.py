"""Find the newest good checkpoint in the nodes' run folders, and prepare these folders for the run."""

from __future__ import annotations

import json
from dataclasses import astuple
from pathlib import Path
from typing import Any

from k8scifar import files
from k8scifar.config.schema import Config
from k8scifar.console import say
from k8scifar.data import packed
from k8scifar.errors import PeerLost, TrainingError, UserError
from k8scifar.ranks import agree, nccl, transfer
from k8scifar.ranks.world import World
from k8scifar.results import ownership
from k8scifar.results.run_folder import RunFolder
from k8scifar.results.summary import MARKER
from k8scifar.results.weights import WEIGHTS
from k8scifar.training import checkpoint

RESULTS = ("config.yaml", "metrics.jsonl", WEIGHTS, "report.html")  # of a finished run; copied to nodes without them


def find(config: Config, manifest: packed.Manifest, world: World) -> tuple[dict[str, Any] | None, bytes | None]:
    """Return (summary, None) of a finished run, or (None, newest good checkpoint of any node, if there is one).

    Collective; the same on all ranks. Nodes that lack the files copy them. Raises UserError if a folder can't be used.
    """
    folder, mine = RunFolder(config.run_dir), _Found()
    seen = agree.each(world, (lambda: _look(folder, config, manifest, mine)) if world.keeps else None)
    found = {rank: facts for rank, facts in enumerate(seen) if facts}
    if finished := [rank for rank, facts in found.items() if facts["finished"]]:
        summary = agree.broadcast(json.dumps(mine.summary).encode(), finished[0], world)
        if len(finished) < len(found):
            _copy_results(folder, config.checkpoint.adopt, finished, world)
        return json.loads(summary), None
    good = {rank: facts["checkpoint"] for rank, facts in found.items() if facts["checkpoint"]}
    if not good:
        _refuse(folder, list(found.values()))
        _open(folder, config, world)
        return None, None
    step = max(map(checkpoint.step_of, good.values()))
    newest = {rank: name for rank, name in good.items() if checkpoint.step_of(name) == step}
    source = min(newest)
    if len(set(newest.values())) > 1 and world.is_main:
        listing = ", ".join(f"{name} on the node of rank {rank}" for rank, name in newest.items())
        say(f"the nodes have drifted apart by step {step}: {listing}; resuming from rank {source}'s checkpoint")
    content = agree.broadcast(mine.content, source, world)
    _open(folder, config, world, good[source], content, source)
    return None, content


class _Found:
    """What this rank found in its run folder."""

    summary: dict[str, Any] | None = None
    content = b""  # of the newest good checkpoint


def _look(folder: RunFolder, config: Config, manifest: packed.Manifest, mine: _Found) -> dict[str, Any]:
    """Look into one node's run folder and claim it; return what is there. Nothing else changes."""
    facts: dict[str, Any] = {"finished": False, "checkpoint": "", "damaged": False}
    try:
        ownership.check_owner(folder.path, config.checkpoint.adopt)
        mine.summary = folder.summary()
        facts["summary"] = mine.summary is not None
        if mine.summary and folder.is_finished(mine.summary, config, manifest):
            return facts | {"finished": True}
        if folder.path.is_dir():
            ownership.take(folder.path, config.checkpoint.adopt)  # no other process may write in it from here on
        for path, content, why in checkpoint.newest_good(folder.checkpoints):
            if content is not None:
                mine.content = content
                return facts | {"checkpoint": path.name}
            say(f"{why}; trying the checkpoint before it")
            facts["damaged"] = True
    except OSError as error:
        kind = TrainingError if error.errno in files.TRANSIENT else UserError
        raise kind(f"{folder.path} can't be read: {error.strerror}; look at its owner and its volume") from None
    return facts


def _refuse(folder: RunFolder, found: list[dict[str, Any]]) -> None:
    """Raise UserError where no checkpoint is good but the folder shows that there was one."""
    if any(facts["summary"] for facts in found):
        raise UserError(f"{folder.path} has a summary but no checkpoint to resume from; give the run another --name")
    if any(facts["damaged"] for facts in found):
        raise UserError(
            f"no checkpoint in {folder.checkpoints} is whole; remove them to start anew, or use another --name"
        )


def _open(
    folder: RunFolder, config: Config, world: World, name: str = "", content: bytes = b"", source: int = 0
) -> None:
    """Prepare each run folder, and copy the checkpoint `name` of rank `source` into it; collective.

    A node on which that fails keeps no checkpoints for now. Raises TrainingError where it fails on every node.
    """

    def make() -> str:
        try:
            folder.create(config)
            folder.forget_summary()
            nccl.make_folder(folder.path)
            path = folder.checkpoints / name
            if name and world.rank != source and not _is_whole(path):
                files.write_atomically(path, content)
                say(f"{path} comes from the node of rank {source}")
        except PeerLost:
            raise
        except TrainingError as error:
            return str(error)
        except OSError as error:
            if error.errno in files.FULL | files.TRANSIENT:
                return files.unwritten(folder.path, error)
            raise UserError(f"run folder {folder.path} can't be written: {error.strerror}; check its owner") from None
        if name and world.rank == source:
            say(f"resuming from {folder.checkpoints / name}")
        return ""

    results = agree.each(world, make if world.keeps else None)
    problems = [problem for problem in results if problem is not None]
    if all(problems):
        raise TrainingError(problems[0])
    if problem := results[world.rank]:
        say(f"{problem}; another node keeps the checkpoints meanwhile")


def _is_whole(path: Path) -> bool:
    try:
        return bool(checkpoint.read_verified(path))
    except (checkpoint.Damaged, OSError):
        return False


def _copy_results(folder: RunFolder, adopt: bool, finished: list[int], world: World) -> None:
    """Copy a finished run's files to the nodes that lack them, the summary last; collective."""
    source, lacks = finished[0], world.keeps and world.rank not in finished

    def list_files() -> list[list[Any]]:
        newest = [f"checkpoints/{path.name}" for path in checkpoint.listed(folder.checkpoints)[:1]]
        names = [name for name in (*newest, *RESULTS, MARKER) if (folder.path / name).is_file()]
        return [list(astuple(transfer.File.of(folder.path, name))) for name in names]

    try:
        listed = agree.each(world, list_files if world.rank == source else None)[source]
        offered = [transfer.File(*values) for values in listed if _may_come(values[0])]
        wanted = [file.name for file in offered if not file.is_in(folder.path)] if lacks else []
        if lacks:
            say(f"the run is finished: copying its results from the node of rank {source} to {folder.path}")
            files.make_folder(folder.path)
            ownership.take(folder.path, adopt)
    except OSError as error:
        raise TrainingError(f"{folder.path} can't be used: {error.strerror}; look at its volume") from None
    transfer.spread(offered, folder.path, wanted, source, world)
    ownership.leave()


def _may_come(name: str) -> bool:
    """Whether a file name from another node is a run folder's, so that it can't lead out of the folder."""
    parent, _, file = name.rpartition("/")
    return name in (*RESULTS, MARKER) or (parent == "checkpoints" and checkpoint.is_named(file))
