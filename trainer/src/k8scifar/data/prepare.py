"""`k8scifar prepare`: bring a data set into its packed form, once."""

from __future__ import annotations

import argparse
import re
import time
from pathlib import Path

from k8scifar.console import say
from k8scifar.data import packed, remote
from k8scifar.errors import TrainingError, UserError
from k8scifar.files import locked, remove_temporary
from k8scifar.urls import is_address, public

NOTICE = (
    "NOTICE: CIFAR-10 can't be downloaded here, so SYNTHETIC pictures are used instead.\n"
    "NOTICE: the accuracy will NOT be CIFAR-10's; use --source cifar10 or imagefolder:PATH for the real thing."
)
SYNTHETIC_COUNTS = (50_000, 10_000)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Command line of `k8scifar prepare`."""
    parser.add_argument(
        "--source",
        default="auto",
        help="auto, cifar10, synthetic, imagefolder:PATH, or imagefolder:https://... or :s3://... of an archive "
        "(default: auto)",
    )
    parser.add_argument(
        "--data-dir", default="data", metavar="DIR", help="folder of the packed data set (default: data)"
    )
    parser.add_argument(
        "--wait", type=float, metavar="SECONDS", help="do not prepare: wait so long for another process's copy"
    )


def run(args: argparse.Namespace) -> int:
    """`k8scifar prepare`."""
    folder = Path(args.data_dir)
    if args.wait is not None:
        say(f"data ready in {folder}: {describe(wait(folder, args.wait))}")
        return 0
    manifest, fresh = prepare(folder, args.source)
    say(f"data {'packed into' if fresh else 'already in'} {folder}: {describe(manifest)}")
    return 0


def prepare(folder: Path, source: str = "auto") -> tuple[packed.Manifest, bool]:
    """Make `folder` hold a whole packed copy of `source`; returns its manifest and whether it was made now.

    Idempotent; of several at once one works and the others take its copy. Raises UserError.
    """
    check_source(source)
    try:
        folder.mkdir(parents=True, exist_ok=True)
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


def wait(folder: Path, seconds: float) -> packed.Manifest:
    """The manifest that another process writes within `seconds`. Raises TrainingError when it does not come."""
    deadline = time.monotonic() + seconds
    said = False
    while True:
        manifest = packed.read_manifest(folder)
        if manifest:
            return manifest
        if time.monotonic() >= deadline:
            raise TrainingError(
                f"no data set appeared in {folder} within {seconds:.0f} s; look at the log of the pod that prepares it"
            )
        if not said:
            say(f"waiting for the data set in {folder} (up to {seconds:.0f} s)")
            said = True
        time.sleep(min(1.0, max(0.0, deadline - time.monotonic())))


def require(folder: Path) -> packed.Manifest:
    """The manifest of a prepared folder. Raises UserError where there is none."""
    manifest = packed.read_manifest(folder)
    if manifest is None:
        raise UserError(f"there is no data set in {folder}; run `k8scifar prepare --data-dir {folder}` first")
    return manifest


def check_source(source: str) -> None:
    """Raise UserError where `source` is none that exists."""
    if not re.fullmatch(r"auto|cifar10|synthetic(:\d+:\d+)?|imagefolder:.+", source):
        raise UserError(
            f"source {source!r} is unknown; use auto, cifar10, synthetic, imagefolder:PATH or imagefolder:https://..."
        )


def describe(manifest: packed.Manifest) -> str:
    """One line about a packed data set."""
    counts = " + ".join(f"{manifest.counts[split]:,} {split}" for split in packed.SPLITS)
    return f"{manifest.source}, {counts} pictures, {len(manifest.classes)} classes, fingerprint {manifest.fingerprint}"


def _present(folder: Path, source: str) -> packed.Manifest | None:
    """The manifest of the copy that is there, if it is whole and of this source; says why not."""
    try:
        manifest = packed.read_manifest(folder)
    except UserError as error:
        say(f"{error} -- preparing anew")
        return None
    if manifest is None:
        return None
    if source != "auto" and _identity(source) != manifest.source:
        say(f"{folder} holds {manifest.source}; replacing it with {_identity(source)}")
        return None
    damage = packed.damage(folder, manifest)
    if damage:
        say(f"{damage} -- preparing anew")
        if source == "auto" and manifest.source.startswith("imagefolder:"):
            raise UserError(f"{damage}, with --source imagefolder:PATH, since it came from there")
        return None
    if source == "auto" and manifest.source.startswith("synthetic"):
        say(NOTICE.replace("can't be downloaded here, so", "is not what is prepared here:").replace(" instead", ""))
    return manifest


def _build(folder: Path, source: str, alone: bool) -> packed.Manifest:
    kind, _, rest = source.partition(":")
    if kind in ("auto", "cifar10"):
        from k8scifar.data import cifar10

        say("downloading CIFAR-10 (170 MB)")
        try:
            classes, splits = cifar10.download(folder)
        except cifar10.DownloadError:
            if kind == "cifar10":
                raise
            say(NOTICE)
            return _build(folder, "synthetic", alone)
        return packed.write(folder, "cifar10", classes, splits)
    if kind == "synthetic":
        from k8scifar.data import synthetic

        train, test = (int(count) for count in rest.split(":")) if rest else SYNTHETIC_COUNTS
        if min(train, test) < len(synthetic.CLASSES):
            raise UserError(f"source {source!r}: each split needs at least {len(synthetic.CLASSES)} pictures")
        say(f"painting {train + test:,} synthetic pictures")
        splits = {"train": synthetic.split(train, seed=1), "test": synthetic.split(test, seed=2)}
        return packed.write(folder, source, synthetic.CLASSES, splits)
    from k8scifar.data import images

    if is_address(rest):
        say(f"downloading {public(rest)}")
        with remote.fetched(rest, folder, alone) as archive:
            classes, splits = images.read_tree(archive, public(rest))
    else:
        say(f"reading the pictures of {rest}")
        classes, splits = images.read_tree(Path(rest))
    return packed.write(folder, _identity(source), classes, splits)


def _identity(source: str) -> str:
    """`source` as the manifest keeps it: a path made absolute, so that it means the same from any folder.

    An address comes without its credentials.
    """
    kind, _, rest = source.partition(":")
    if kind == "imagefolder" and is_address(rest):
        return f"imagefolder:{public(rest)}"
    return f"imagefolder:{Path(rest).resolve()}" if kind == "imagefolder" else source
