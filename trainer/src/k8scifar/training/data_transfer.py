"""Compare the ranks' settings and data, and copy the data set to nodes that have their own data folder."""

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

RECEIVED = ".received"  # fingerprints of the data sets that this folder has from another node: replaceable


def prepared(config: Config) -> packed.Manifest | None:
    """The data set of the folder that all ranks share; None if each node has its own folder. Raises UserError."""
    folder = Path(config.data.dir)
    if config.distributed.storage == "shared":
        return require(folder)
    if node_of_this_rank() == 0 and not (folder / packed.MANIFEST).exists():
        say(f"there is no data set in {folder}; copying it from another node, if one has it")
    return None


def supply(config: Config, manifest: packed.Manifest | None, world: World) -> packed.Manifest:
    """Meet the other ranks, copy missing files, and return the data set that all train on; collective.

    If each node has its own folder, that is node 0's data set; if node 0 has none, that of the first node with one.
    Raises PeersDiffer if the ranks' settings differ, UserError if a node holds a different data set that it prepared.
    """
    data = {"data": manifest.fingerprint} if manifest else {}
    attempt = {"attempt": os.environ.get(participants.ATTEMPT, "")}  # ranks of an earlier attempt must not join
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
    agree.each(world, (lambda: _write_manifest(folder, given)) if is_first else None)
    return given


def _mathematics() -> dict[str, str]:
    """Versions that must be equal on all ranks."""
    return {name: version for name, version in versions.versions().items() if name in ("k8scifar", "code", "torch")}


def _look(folder: Path) -> str:
    """This node's manifest as text; "" if it or one of its files is missing. Raises Foreign, TrainingError."""
    here = _here(folder)
    damaged = _missing(folder, _files(here)) if here else (folder / packed.MANIFEST).exists()
    if damaged:
        say(f"the data set in {folder} is damaged; copying it from another node, if one has it")
    return packed.manifest_bytes(here).decode() if here and not damaged else ""


def _files(manifest: packed.Manifest) -> list[transfer.File]:
    return [transfer.File(entry["name"], entry["sha256"], entry["bytes"]) for entry in manifest.files.values()]


def _missing(folder: Path, wanted: list[transfer.File]) -> list[transfer.File]:
    """The files that are missing in the folder, or damaged. Raises TrainingError."""
    try:
        return [file for file in wanted if not file.is_in(folder)]
    except OSError as error:
        raise TrainingError(f"data folder {folder} can't be read ({error.strerror}); look at its volume") from None


def _lacking(folder: Path, given: packed.Manifest, offered: list[transfer.File], source: int) -> list[str]:
    """Names of the files that this node must copy. Raises UserError if its data set must not be replaced."""
    here, instead = _here(folder), ""
    if here and here.fingerprint != given.fingerprint:
        if here.fingerprint not in _received(folder):
            raise UserError(
                f"{folder} holds another data set ({here.source}, fingerprint {here.fingerprint}) than rank {source}'s "
                f"node ({given.source}, {given.fingerprint}); move it away, or give this machine another --data-dir"
            )
        instead = f", replacing {here.source}"
    lacking = _missing(folder, offered)
    if lacking:
        size = sum(file.bytes for file in lacking) / 1e6
        say(f"copying {given.source} from rank {source}'s node to {folder} ({size:,.1f} MB){instead}")
    return [file.name for file in lacking]


def _write_manifest(folder: Path, given: packed.Manifest) -> None:
    """Write the manifest, once all of its files are in the folder. Raises TrainingError."""
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
    """The manifest of this node's folder; None if it is missing or damaged. Raises Foreign, TrainingError."""
    try:
        return packed.read_manifest(folder)
    except packed.Foreign:
        raise
    except UserError:
        return None


def _received(folder: Path) -> list[str]:
    """Fingerprints of the data sets that this folder has from another node."""
    try:
        return files.read(folder / RECEIVED).decode(errors="replace").split()
    except OSError:
        return []
