"""Copy a run out of a cluster, completely or not at all, into a folder for this run only."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path, PurePosixPath
from typing import Any

from kube import Kubectl, Release, ToolError
from kube_objects import named, note
from volume_reader import OutOfReach, reading
from volumes import group

TRIES = 3
FILTER = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # Python 3.10.12 and newer have it
ORIGIN = ".k8scifar-run.json"  # in a folder of results: which run it is, and which files were copied


def results(
    release: Release, target: Path | None, everything: bool, run_dir: str = "", image: str = "", claim: str = ""
) -> int:
    """Copy the run folder to `target` (default: a folder for this run in results/). Raises ToolError."""
    claims = {named(item): item for item in release.claims()}
    first = chosen_claim(release, claims, claim)
    copies = [first] if claim else [first, *copies_of(claims, first)]
    if not run_dir and first in claims and first != release.claim_name():
        run_dir = note(claims[first], "run-dir")
    run_dir = run_dir or release.run_dir()
    for name in copies:
        origin = {
            "namespace": release.kubectl.namespace,
            "release": release.name,
            "run": run_dir,
            "claim": name,
            "uid": claims[name]["metadata"].get("uid", "") if name in claims else "",
        }
        try:
            folder = place(origin, target)
            # A copy that has the checkpoints keeps having them.
            whole = everything or name != first or (folder / "checkpoints").is_dir()
            with reading(release, name, image, alone=len(copies) == 1) as reader:
                copy(release.kubectl, *reader, run_dir, folder, origin, whole)
            return 0
        except OutOfReach as error:
            if name == copies[-1]:
                raise
            after = copies[copies.index(name) + 1]
            print(f"{name}: {error}; reading another node's copy, {after}, with its checkpoints", flush=True)
        except OSError as error:
            raise ToolError(
                f"{error.filename or 'the copy'} can't be written: {error.strerror}; what was there is kept"
            ) from None
    return 0


def chosen_claim(release: Release, claims: dict[str, Any], asked: str) -> str:
    """The claim to read: the one asked for, else the workload's, else the newest. Raises ToolError."""
    used = release.claim_name()
    if asked and asked not in (*claims, used):
        raise ToolError(f"release {release.name} has no claim {asked}: CLAIM={' or '.join(claims) or used}")
    if asked:
        return asked
    first = used or next(iter(claims), "")
    kept = [name for name in claims if name not in (first, *copies_of(claims, first))]
    if kept:
        why = "in use" if used else "the newest"
        print(f"reading {first}, {why}; older claims were kept, which CLAIM=... reads: {', '.join(kept)}", flush=True)
    return first


def copies_of(claims: dict[str, Any], claim: str) -> list[str]:
    """The other pods' claims, with copies of the run, if each pod has a claim."""
    stems = {name: group(item)[0] for name, item in claims.items()}
    return [name for name, stem in stems.items() if name != claim and stem == stems.get(claim)]


def place(origin: dict[str, str], target: Path | None) -> Path:
    """The folder for a run: one with this run, or an empty one. Raises ToolError if `target` has something else."""
    if target:
        if is_free(target) or held(target) == origin:
            return target
        raise ToolError(f"{target} holds {whose(target)}: choose another folder, or move it away")
    run = PurePosixPath(origin["run"]).name
    long = f"{origin['namespace']}-{origin['release']}-{run}"
    digest = hashlib.sha256(json.dumps(origin, sort_keys=True).encode()).hexdigest()[:8]
    choices = [Path("results") / name for name in (origin["release"], long, f"{long}-{digest}")]
    found = next((each for each in choices if held(each) == origin), None) or next(filter(is_free, choices), None)
    if not found:
        raise ToolError(f"{choices[0]} holds {whose(choices[0])}, and {choices[-1]} is taken too: move it away")
    if found != choices[0]:
        print(f"{choices[0]} holds {whose(choices[0])}: this one goes to {found}", flush=True)
    return found


def is_free(folder: Path) -> bool:
    """Whether the folder is missing or empty."""
    restore(folder)
    return not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))


def held(folder: Path) -> dict[str, str]:
    """The identity of the run that a folder holds; empty if it has none."""
    restore(folder)
    with contextlib.suppress(OSError, ValueError, KeyError):
        return json.loads((folder / ORIGIN).read_text())["of"]
    return {}


def whose(folder: Path) -> str:
    """Describe what a folder holds."""
    of = held(folder)
    return f"run {PurePosixPath(of['run']).name} of {of['release']} in {of['namespace']}" if of else "something else"


def copy(
    kubectl: Kubectl, pod: str, container: str, run_dir: str, target: Path, origin: dict[str, str], everything: bool
) -> None:
    """Copy the files of a folder in a pod to `target`, completely or not at all. Raises ToolError."""
    parent, name = str(PurePosixPath(run_dir).parent), PurePosixPath(run_dir).name
    without = [] if everything else [f"--exclude={name}/checkpoints"]
    pack = ["tar", "--create", "--file=-", f"--directory={parent}", "--exclude=.*.tmp", *without, name]
    target.parent.mkdir(parents=True, exist_ok=True)
    message = ""
    for attempt in range(TRIES):
        with tempfile.TemporaryDirectory(prefix=".copy-", dir=target.parent) as folder:
            archive, unpacked = Path(folder, "run.tar"), Path(folder, "run")
            with archive.open("wb") as file:
                command = kubectl.command("exec", pod, f"--container={container}", "--", *pack)
                done = subprocess.run(command, stdout=file, stderr=subprocess.PIPE)
            message = " ".join(done.stderr.decode(errors="replace").split())
            if "No such file" in message or "Cannot open: No such" in message:
                raise OutOfReach(f"there is no run folder {run_dir} yet (make status); RUN_DIR=... chooses another")
            # tar's exit code 1: a file, such as TensorBoard's events, grew while it was read.
            if done.returncode in (0, 1) and is_whole(archive):
                unpack(archive, unpacked)
                swap(unpacked / name, target, origin)
                report(target)
                return
        print(f"the copy is incomplete ({message[-200:] or 'the stream ended'}); trying again", file=sys.stderr)
        time.sleep(attempt)
    raise ToolError(f"the run could not be copied: {message[-200:] or 'the stream ended early'}")


def is_whole(archive: Path) -> bool:
    """Whether a tar file has its end, two blocks of zeros."""
    size = archive.stat().st_size
    with archive.open("rb") as file:
        file.seek(max(0, size - 1024))
        return size >= 1024 and size % 512 == 0 and not any(file.read())


def unpack(archive: Path, target: Path) -> None:
    """Unpack plain files and folders inside `target`. Raises ToolError for anything else."""
    with tarfile.open(archive) as tar:
        for member in tar:
            path = PurePosixPath(member.name)
            if path.is_absolute() or ".." in path.parts or not (member.isfile() or member.isdir()):
                raise ToolError(f"the run folder holds {member.name}, which is not a plain file: not copied")
            tar.extract(member, target, **FILTER)


def swap(source: Path, target: Path, origin: dict[str, str]) -> None:
    """Replace `target` by `source`; files that the user put beside the copied ones are kept."""
    names = sorted(path.name for path in source.iterdir())
    copied = set(names)
    if target.is_dir():
        with contextlib.suppress(OSError, ValueError, KeyError):
            copied |= set(json.loads((target / ORIGIN).read_text())["files"])
        for path in target.iterdir():
            if path.name not in copied | {ORIGIN}:
                (shutil.copytree if path.is_dir() else shutil.copy2)(path, source / path.name)
    (source / ORIGIN).write_text(json.dumps({"of": origin, "files": names}, indent=1) + "\n")
    before = earlier(target)
    try:
        if target.exists():
            target.rename(before)
        source.rename(target)
    except BaseException:
        restore(target)
        raise
    shutil.rmtree(before, ignore_errors=True)


def earlier(target: Path) -> Path:
    """Where the former copy is while the new one replaces it."""
    return target.with_name(f".{target.name}.earlier")


def restore(target: Path) -> None:
    """Undo a replacement that was interrupted."""
    if earlier(target).exists() and not target.exists():
        earlier(target).rename(target)
    shutil.rmtree(earlier(target), ignore_errors=True)


def report(target: Path) -> None:
    """Print the copied files and the accuracy."""
    files = [path for path in target.rglob("*") if path.is_file() and path.name != ORIGIN]
    size = sum(path.stat().st_size for path in files) / 1e6
    names = ", ".join(sorted(path.name for path in target.iterdir() if path.name != ORIGIN))
    print(f"copied {len(files)} files, {size:.1f} MB, to {target}: {names}")
    try:
        summary = json.loads((target / "summary.json").read_text())
        images = "held-out" if "heldout_images" in summary else "test"
        print(f"{images} accuracy {summary['accuracy']:.2%} after {summary['epochs']} epochs")
        print(f"open {target / 'report.html'}")
    except (OSError, ValueError, KeyError):
        print("the training is not finished: there is no summary.json yet")
