"""The ranks meet, and each node gets the data set: where it has a folder of its own, node 0's packed files."""

from __future__ import annotations

from pathlib import Path

from k8scifar import files, versions
from k8scifar.config.schema import Config
from k8scifar.console import say
from k8scifar.data import packed
from k8scifar.data.prepare import require
from k8scifar.errors import TrainingError, UserError
from k8scifar.ranks import agree, transfer
from k8scifar.ranks.world import World, node_of_this_rank

RECEIVED = ".received"  # fingerprints of the data sets that node 0 gave this folder, which may be replaced


def prepared(config: Config) -> packed.Manifest | None:
    """The data set that somebody has prepared for this node; None where it comes from node 0. Raises UserError."""
    if config.distributed.storage == "local" and node_of_this_rank() > 0:
        return None
    return require(Path(config.data.dir))


def supply(config: Config, manifest: packed.Manifest | None, world: World) -> packed.Manifest:
    """Meet the other ranks; returns the data set that all train on, whose files are then on every node. Collective.

    Raises PeersDiffer where ranks do not belong together, UserError where a node holds another data set that node 0
    did not give it.
    """
    data = {} if world.own_folders or manifest is None else {"data": manifest.fingerprint}
    agree.meet(world, config.shared() | data | _mathematics())
    if manifest is not None and not world.own_folders:
        return manifest
    folder = Path(config.data.dir)
    offer = agree.broadcast(packed.manifest_bytes(manifest) if manifest else b"", 0, world)
    given = packed.parse_manifest(offer, "node 0's manifest")
    offered = [transfer.File(entry["name"], entry["sha256"], entry["bytes"]) for entry in given.files.values()]
    takes = world.node > 0 and world.local_rank == 0
    lacking = agree.each(world, (lambda: _lacking(folder, given, offered)) if takes else None)
    if any(lacking):
        transfer.spread(offered, folder, lacking[world.rank] or [], 0, world)
    agree.each(world, (lambda: _settle(folder, given)) if takes else None)
    return given


def _mathematics() -> dict[str, str]:
    """Versions that all ranks must have alike."""
    return {name: version for name, version in versions.versions().items() if name in ("k8scifar", "code", "torch")}


def _lacking(folder: Path, given: packed.Manifest, offered: list[transfer.File]) -> list[str]:
    """Names of the files that this node has to take. Raises UserError where what it has is not to be replaced."""
    here = _here(folder)
    try:
        if here and here.fingerprint != given.fingerprint and here.fingerprint not in _received(folder):
            raise UserError(
                f"{folder} holds another data set ({here.source}, fingerprint {here.fingerprint}) than node 0's "
                f"({given.source}, {given.fingerprint}); move it away, or give this machine another --data-dir"
            )
        lacking = [file for file in offered if not file.is_in(folder)]
    except OSError as error:
        raise TrainingError(f"data folder {folder} can't be read ({error.strerror}); look at its volume") from None
    if lacking:
        size = sum(file.bytes for file in lacking) / 1e6
        instead = f", in place of {here.source}" if here and here.fingerprint != given.fingerprint else ""
        say(f"taking {given.source} from node 0 into {folder} ({size:,.1f} MB){instead}")
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
    """The manifest of this node's folder; None where there is none, or a damaged one. Raises Foreign."""
    try:
        return packed.read_manifest(folder)
    except packed.Foreign:
        raise
    except UserError as error:
        say(f"{error.args[0].partition(';')[0]}; taking node 0's")
        return None


def _received(folder: Path) -> list[str]:
    """Fingerprints of the data sets that node 0 gave this folder."""
    try:
        return files.read(folder / RECEIVED).decode(errors="replace").split()
    except (FileNotFoundError, NotADirectoryError):
        return []
