"""The ranks meet, and each node gets the data set: where it has a folder of its own, another's packed files."""

from __future__ import annotations

import os
from pathlib import Path

from k8scifar import files, versions
from k8scifar.config.schema import Config
from k8scifar.console import say
from k8scifar.data import packed
from k8scifar.data.prepare import require
from k8scifar.errors import TrainingError, UserError
from k8scifar.ranks import agree, transfer
from k8scifar.ranks.world import World, node_of_this_rank
from k8scifar.results import participants

RECEIVED = ".received"  # fingerprints of the data sets that another node gave this folder, which may be replaced


def prepared(config: Config) -> packed.Manifest | None:
    """The data set of the folder that all ranks see; None where each node has its own. Raises UserError."""
    folder = Path(config.data.dir)
    if config.distributed.storage == "shared":
        return require(folder)
    if node_of_this_rank() == 0 and not (folder / packed.MANIFEST).exists():
        say(f"there is no data set in {folder}; this node takes another's, if one has it")
    return None


def supply(config: Config, manifest: packed.Manifest | None, world: World) -> packed.Manifest:
    """Meet the other ranks; returns the data set that all train on, whose files are then on every node. Collective.

    Where nodes have folders of their own, it is node 0's; or, if that has lost it, that of the first one which has it.
    Raises PeersDiffer where ranks do not belong together, UserError where a node holds another data set that no other
    gave it.
    """
    data = {"data": manifest.fingerprint} if manifest else {}
    attempt = {"attempt": os.environ.get(participants.ATTEMPT, "")}  # a rank of a former one belongs to nobody here
    agree.meet(world, config.shared() | data | _mathematics() | attempt)
    if manifest:
        return manifest
    folder, is_first = Path(config.data.dir), world.local_rank == 0
    seen = agree.each(world, (lambda: _look(folder)) if is_first else None)
    source = next((rank for rank, content in enumerate(seen) if content), None)
    if source is None:
        raise UserError(f"no node has a whole data set; run `k8scifar prepare --data-dir {folder}` on node 0 first")
    given = packed.parse_manifest(seen[source].encode(), f"the {packed.MANIFEST} of rank {source}'s node")
    offered = _files(given)
    lacking = agree.each(world, (lambda: _lacking(folder, given, offered, source)) if is_first else None)
    if any(lacking):
        transfer.spread(offered, folder, lacking[world.rank] or [], source, world)
    agree.each(world, (lambda: _settle(folder, given)) if is_first else None)
    return given


def _mathematics() -> dict[str, str]:
    """Versions that all ranks must have alike."""
    return {name: version for name, version in versions.versions().items() if name in ("k8scifar", "code", "torch")}


def _look(folder: Path) -> str:
    """The content of this node's manifest, "" unless all of its files are here too. Raises Foreign, TrainingError."""
    here = _here(folder)
    damaged = _missing(folder, _files(here)) if here else (folder / packed.MANIFEST).exists()
    if damaged:
        say(f"the data set in {folder} is damaged; this node takes another's, if one has it")
    return packed.manifest_bytes(here).decode() if here and not damaged else ""


def _files(manifest: packed.Manifest) -> list[transfer.File]:
    return [transfer.File(entry["name"], entry["sha256"], entry["bytes"]) for entry in manifest.files.values()]


def _missing(folder: Path, wanted: list[transfer.File]) -> list[transfer.File]:
    """Those that are not in the folder, or not whole. Raises TrainingError."""
    try:
        return [file for file in wanted if not file.is_in(folder)]
    except OSError as error:
        raise TrainingError(f"data folder {folder} can't be read ({error.strerror}); look at its volume") from None


def _lacking(folder: Path, given: packed.Manifest, offered: list[transfer.File], source: int) -> list[str]:
    """Names of the files that this node has to take. Raises UserError where what it has is not to be replaced."""
    here, instead = _here(folder), ""
    if here and here.fingerprint != given.fingerprint:
        if here.fingerprint not in _received(folder):
            raise UserError(
                f"{folder} holds another data set ({here.source}, fingerprint {here.fingerprint}) than rank {source}'s "
                f"node ({given.source}, {given.fingerprint}); move it away, or give this machine another --data-dir"
            )
        instead = f", in place of {here.source}"
    lacking = _missing(folder, offered)
    if lacking:
        size = sum(file.bytes for file in lacking) / 1e6
        say(f"taking {given.source} from rank {source}'s node into {folder} ({size:,.1f} MB){instead}")
    return [file.name for file in lacking]


def _settle(folder: Path, given: packed.Manifest) -> None:
    """Once all files are here: the manifest, which vouches for them. Raises TrainingError."""
    here = _here(folder)
    if here and here.fingerprint == given.fingerprint:
        return
    try:
        known = [*_received(folder), given.fingerprint]
        files.write_atomically(folder / RECEIVED, "\n".join(dict.fromkeys(known)).encode())
        files.write_atomically(folder / packed.MANIFEST, packed.manifest_bytes(given))
        packed.remove_strays(folder, given)
    except OSError as error:
        raise TrainingError(files.unwritten(folder / packed.MANIFEST, error)) from None


def _here(folder: Path) -> packed.Manifest | None:
    """The manifest of this node's folder; None where there is none, or a damaged one. Raises Foreign, TrainingError."""
    try:
        return packed.read_manifest(folder)
    except packed.Foreign:
        raise
    except UserError:
        return None


def _received(folder: Path) -> list[str]:
    """Fingerprints of the data sets that another node gave this folder."""
    try:
        return files.read(folder / RECEIVED).decode(errors="replace").split()
    except OSError:
        return []
