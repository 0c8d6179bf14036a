"""Copies a run out of a cluster, whole or not at all, into a folder that holds this run and no other."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path, PurePosixPath

from kube import Kubectl, Release, ToolError
from kube_objects import note
from volume_reader import OutOfReach, reading
from volumes import siblings

TRIES = 3  # of a copy
ORIGIN = ".k8scifar-run.json"  # in a folder of results: whose run it is, and what of it was copied


def results(
    release: Release, target: Path | None, everything: bool, run_dir: str = "", image: str = "", claim: str = ""
) -> int:
    """Copy the run folder to `target` (default: one of its own in results/).

    It is read through a pod that has the volume, or one made for it. Raises ToolError.
    """
    first = chosen_claim(release, claim)
    copies = [first] if claim else [first, *others(release, first)]
    run_dir = run_dir or noted(release, first, "run-dir") or release.run_dir()
    for name in copies:
        origin = identity(release, name, run_dir)
        try:
            folder = place(origin, target)
            # What was copied once with its checkpoints is not made poorer.
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


def chosen_claim(release: Release, asked: str) -> str:
    """The claim to read: the one that is asked for, else the workload's, else the newest. Raises ToolError."""
    found = release.claims()
    names = [item["metadata"]["name"] for item in found]
    used = release.claim_name()
    if asked:
        if asked not in (*names, used):
            raise ToolError(f"release {release.name} has no claim {asked}: CLAIM={' or '.join(names) or used}")
        return asked
    first = used or next(iter(names), "")
    kept = [name for name in names if name not in [first, *others(release, first)]]
    if kept:
        why = "in use" if used else "the newest"
        print(f"reading {first}, {why}; older ones were kept, which CLAIM=... reads: {', '.join(kept)}", flush=True)
    return first


def others(release: Release, claim: str) -> list[str]:
    """Where each pod has a claim of its own: those of the other pods, which hold copies of the run."""
    stems = {item["metadata"]["name"]: siblings(item)[0] for item in release.claims()}
    return [name for name, stem in stems.items() if name != claim and stem == stems.get(claim)]


def noted(release: Release, claim: str, key: str) -> str:
    """What a claim that is not the workload's is annotated with; empty where there is nothing."""
    if claim == release.claim_name():
        return ""
    kept = [item for item in release.claims() if item["metadata"]["name"] == claim]
    return next(filter(None, (note(item, key) for item in kept)), "")


def identity(release: Release, claim: str, run_dir: str) -> dict[str, str]:
    """What tells a run from all others, of other clusters too."""
    found = next((item for item in release.claims() if item["metadata"]["name"] == claim), {"metadata": {}})
    return {
        "namespace": release.kubectl.namespace,
        "release": release.name,
        "run": run_dir,
        "claim": claim,
        "uid": found["metadata"].get("uid", ""),
    }


def place(origin: dict[str, str], target: Path | None) -> Path:
    """The folder for a run: one that holds it, or nothing. Raises ToolError where `target` holds something else."""
    if target:
        if is_free(target) or held(target) == origin:
            return target
        raise ToolError(f"{target} holds {whose(target)}: name another folder, or move it away")
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
    """Whether nothing is there that could be lost."""
    restore(folder)
    return not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))


def held(folder: Path) -> dict[str, str]:
    """Whose run a folder holds; empty where it does not say."""
    restore(folder)
    with contextlib.suppress(OSError, ValueError, KeyError):
        return json.loads((folder / ORIGIN).read_text())["of"]
    return {}


def whose(folder: Path) -> str:
    """What a folder holds, in words."""
    of = held(folder)
    return f"run {PurePosixPath(of['run']).name} of {of['release']} in {of['namespace']}" if of else "something else"


def copy(
    kubectl: Kubectl, pod: str, container: str, run_dir: str, target: Path, origin: dict[str, str], everything: bool
) -> None:
    """Copy the files of a folder in a pod to `target`, whole or not at all. Raises ToolError."""
    parent, name = str(PurePosixPath(run_dir).parent), PurePosixPath(run_dir).name
    without = [] if everything else [f"--exclude={name}/checkpoints"]
    pack = ["tar", "--create", "--file=-", f"--directory={parent}", "--exclude=.*.tmp", *without, name]
    target.parent.mkdir(parents=True, exist_ok=True)
    said = ""
    for attempt in range(TRIES):
        with tempfile.TemporaryDirectory(prefix=".copy-", dir=target.parent) as folder:
            archive, unpacked = Path(folder, "run.tar"), Path(folder, "run")
            with archive.open("wb") as file:
                command = kubectl.command("exec", pod, f"--container={container}", "--", *pack)
                done = subprocess.run(command, stdout=file, stderr=subprocess.PIPE)
            said = " ".join(done.stderr.decode(errors="replace").split())
            if "No such file" in said or "Cannot open: No such" in said:
                raise OutOfReach(f"there is no run folder {run_dir} yet (make status), or say another: RUN_DIR=...")
            # tar's exit code 1: a file grew as it was read, as events do while training runs.
            if done.returncode in (0, 1) and is_whole(archive):
                unpack(archive, unpacked)
                swap(unpacked / name, target, origin)
                report(target)
                return
        print(f"the copy broke off ({said[-200:] or 'cut short'}); trying again", file=sys.stderr)
        time.sleep(attempt)
    raise ToolError(f"the run could not be copied: {said[-200:] or 'the stream was cut short'}")


def is_whole(archive: Path) -> bool:
    """Whether a tar file has its end: two blocks of zeros."""
    size = archive.stat().st_size
    with archive.open("rb") as file:
        file.seek(max(0, size - 1024))
        return size >= 1024 and size % 512 == 0 and not any(file.read())


def unpack(archive: Path, target: Path) -> None:
    """Unpack plain files and folders that stay inside `target`, and nothing else."""
    with tarfile.open(archive) as tar:
        for member in tar:
            path = PurePosixPath(member.name)
            if path.is_absolute() or ".." in path.parts or not (member.isfile() or member.isdir()):
                raise ToolError(f"the run folder holds {member.name}, which is not a plain file: not copied")
            place = target.joinpath(*path.parts)
            if member.isdir():
                place.mkdir(parents=True, exist_ok=True)
            else:
                place.parent.mkdir(parents=True, exist_ok=True)
                content = tar.extractfile(member)
                assert content is not None
                with place.open("wb") as file:
                    shutil.copyfileobj(content, file)
                os.utime(place, (member.mtime, member.mtime))


def swap(source: Path, target: Path, origin: dict[str, str]) -> None:
    """Put `source` in the place of `target` as a whole; what a person laid beside the copied files moves along."""
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
    """Where the former copy is for the moment in which the new one takes its place."""
    return target.with_name(f".{target.name}.earlier")


def restore(target: Path) -> None:
    """Undo an exchange that was cut off in the middle."""
    if earlier(target).exists() and not target.exists():
        earlier(target).rename(target)
    shutil.rmtree(earlier(target), ignore_errors=True)


def report(target: Path) -> None:
    """Say what came, and what it comes to."""
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
        print("it is not finished: there is no summary.json yet")
