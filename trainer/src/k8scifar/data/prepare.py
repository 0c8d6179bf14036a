"""`k8scifar prepare`: bring a data set into its packed form, once."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path

from k8scifar.console import say
from k8scifar.data import packed
from k8scifar.data.reading import cifar10, images, remote
from k8scifar.errors import UserError
from k8scifar.files import locked, make_folder, remove_temporary
from k8scifar.urls import is_address, local, public

NOTICE = (
    "NOTICE: CIFAR-10 can't be downloaded here, so SYNTHETIC images are used instead.\n"
    "NOTICE: the accuracy will NOT be CIFAR-10's; use --source cifar10, cifar10:PATH or "
    "imagefolder:PATH for the real thing."
)
SYNTHETIC_COUNTS = (50_000, 10_000)
Taken = tuple[list[str], dict[str, packed.Split]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Command line of `k8scifar prepare`."""
    parser.add_argument(
        "--source",
        default="auto",
        help="auto, cifar10, synthetic, imagefolder:PATH, cifar10:PATH (its batches, downloaded already), or an "
        "archive at imagefolder:https://... or :s3://... (default: auto)",
    )
    parser.add_argument(
        "--data-dir", default="data", metavar="DIR", help="folder of the packed data set (default: data)"
    )


def run(args: argparse.Namespace) -> int:
    """`k8scifar prepare`."""
    folder = local(args.data_dir)
    manifest, fresh = prepare(folder, args.source)
    say(f"data {'packed into' if fresh else 'already in'} {folder}: {describe(manifest)}")
    return 0


def prepare(folder: Path, source: str = "auto") -> tuple[packed.Manifest, bool]:
    """Make `folder` hold a whole packed copy of `source`; returns its manifest and whether it was made now.

    Idempotent; of several at once one works and the others take its copy. Raises UserError.
    """
    check_source(source)
    try:
        make_folder(folder)
        with locked(folder / ".prepare.lock") as alone:
            if alone:
                remove_temporary(folder)  # of one that was killed
            manifest = _present(folder, source)
            if manifest:
                return manifest, False
            manifest = _build(folder, source, alone)
            packed.remove_strays(folder, manifest)
            return manifest, True
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(
            f"data folder {folder} can't be written: {reason}; free some space (0.5 GB), or choose another --data-dir"
        ) from None


def require(folder: Path) -> packed.Manifest:
    """The manifest of a prepared folder. Raises UserError where there is none."""
    manifest = packed.read_manifest(folder)
    if manifest is None:
        raise UserError(f"there is no data set in {folder}; run `k8scifar prepare --data-dir {folder}` first")
    return manifest


def check_source(source: str) -> None:
    """Raise UserError where `source` is none that exists."""
    if not re.fullmatch(r"auto|cifar10(:.+)?|synthetic(:\d+:\d+)?|imagefolder:.+", source):
        raise UserError(
            f"source {source!r} is unknown; use auto, cifar10, cifar10:PATH, synthetic, imagefolder:PATH or "
            "imagefolder:https://..."
        )
    if slip := re.match(r"(imagefolder|cifar10):(https?|s3):/(?!/)", source):
        raise UserError(f"--source {slip[1]}:{slip[2]}:/... is no address: write two slashes, {slip[2]}://host/...")


def describe(manifest: packed.Manifest) -> str:
    """One line about a packed data set."""
    counts = " + ".join(f"{manifest.counts[split]:,} {split}" for split in packed.SPLITS)
    return f"{manifest.source}, {counts} images, {len(manifest.classes)} classes, fingerprint {manifest.fingerprint}"


def _present(folder: Path, source: str) -> packed.Manifest | None:
    """The manifest of the copy that is there, if it is whole and of this source; says why not."""
    try:
        manifest = packed.read_manifest(folder)
    except packed.Foreign:
        raise  # what is not ours is not written over
    except UserError as error:
        say(f"{error} -- preparing anew")
        return None
    if manifest is None:
        return None
    there = cifar10.local(folder)
    wanted = (
        {_identity(source), _identity(f"cifar10:{there}")} if source == "cifar10" and there else {_identity(source)}
    )
    if source != "auto" and manifest.source not in wanted:
        say(f"{folder} holds {manifest.source}; replacing it with {_identity(source)}")
        return None
    if source == "auto" and there and manifest.source.startswith("synthetic"):
        say(f"{folder} holds {manifest.source}, and {there.name} too; replacing it with CIFAR-10")
        return None
    damage = packed.damage(folder, manifest)
    if damage:
        say(f"{damage} -- preparing anew")
        if source == "auto" and ":" in manifest.source and not manifest.source.startswith("synthetic"):
            kind = manifest.source.partition(":")[0]
            raise UserError(f"{damage}, with --source {kind}:PATH, since it came from there")
        return None
    if source == "auto" and manifest.source.startswith("synthetic"):
        say(NOTICE.replace("can't be downloaded here, so", "is not what is prepared here:").replace(" instead", ""))
    return manifest


def _build(folder: Path, source: str, alone: bool) -> packed.Manifest:
    kind, _, rest = source.partition(":")
    if kind == "synthetic":
        return _painted(folder, source, rest)
    if kind == "imagefolder":
        return _taken(folder, source, rest, alone, images.read_tree)
    if rest:
        return _taken(folder, source, rest, alone, lambda path, label: cifar10.read(path, label)[:2])
    if there := cifar10.local(folder):
        say(f"reading CIFAR-10 from {there}")
        classes, splits, original = cifar10.read(there, str(there))
        return packed.write(folder, "cifar10" if original else _identity(f"cifar10:{there}"), classes, splits)
    say("downloading CIFAR-10 (170 MB)")
    try:
        classes, splits = cifar10.download(folder, alone, patient=kind == "cifar10")
    except cifar10.DownloadError:
        if kind == "cifar10":
            raise
        say(NOTICE)
        return _painted(folder, "synthetic", "")
    return packed.write(folder, "cifar10", classes, splits)


def _painted(folder: Path, source: str, sizes: str) -> packed.Manifest:
    from k8scifar.data import synthetic

    train, test = (int(count) for count in sizes.split(":")) if sizes else SYNTHETIC_COUNTS
    if min(train, test) < len(synthetic.CLASSES):
        raise UserError(f"source {source!r}: each split needs at least {len(synthetic.CLASSES)} images")
    say(f"painting {train + test:,} synthetic images")
    splits = {"train": synthetic.split(train, seed=1), "test": synthetic.split(test, seed=2)}
    return packed.write(folder, source, synthetic.CLASSES, splits)


def _taken(folder: Path, source: str, place: str, alone: bool, read: Callable[[Path, str], Taken]) -> packed.Manifest:
    """What `read` takes from a path or an address, packed."""
    kind = source.partition(":")[0]
    if is_address(place):
        say(f"downloading {public(place)}")
        with remote.fetched(place, folder, alone) as archive:
            classes, splits = read(archive, f"{kind}:{public(place)}")
    else:
        say(f"reading the images of {place}")
        classes, splits = read(local(place), f"{kind}:{place}")
    return packed.write(folder, _identity(source), classes, splits)


def _identity(source: str) -> str:
    """`source` as the manifest keeps it: a path made absolute, so that it means the same from any folder.

    An address comes without its credentials.
    """
    kind, _, rest = source.partition(":")
    if kind not in ("imagefolder", "cifar10") or not rest:
        return source
    return f"{kind}:{public(rest) if is_address(rest) else local(rest).resolve()}"
