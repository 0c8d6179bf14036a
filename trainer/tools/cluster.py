"""What people do every day with a training in a cluster: status, logs, results, TensorBoard. `make` calls it."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path, PurePosixPath
from typing import Any

from kube import MOUNT, Kubectl, Release, ToolError, arguments, exit_code, label, standing

EVENTS = 5  # of a release, shown by `status`
TRIES = 3  # of a copy
START_SECONDS = 180  # for the pod that reads a volume nobody else has mounted


def status(release: Release) -> int:
    """Pods, volumes, warnings, and what the training says of itself."""
    workload = release.workload
    if workload:
        wanted = workload["spec"].get("replicas", workload["spec"].get("completions", 0))
        state = workload.get("status", {})
        ready = state.get("readyReplicas", 0) if workload["kind"] == "StatefulSet" else state.get("active", 0)
        ended = f", {state['succeeded']} done" if state.get("succeeded") else ""
        name = f"{workload['kind']} {workload['metadata']['name']}"
        print(f"{name} in {release.kubectl.namespace}: {ready} of {wanted} pod(s) run{ended}")
    else:
        print(f"release {release.name} in {release.kubectl.namespace}: not installed any more; what it left:")
    for pod in release.pods():
        container, words = standing(pod)
        where = f" on {pod['spec']['nodeName']}" if pod["spec"].get("nodeName") else ""
        print(f"  pod {pod['metadata']['name']}{where}: {f'{container} ' if container else ''}{words}")
    for claim in release.objects.get("PersistentVolumeClaim", []):
        state = claim.get("status", {})
        size = state.get("capacity", {}).get("storage", "")
        print(f"  volume {claim['metadata']['name']}: {state.get('phase', 'unknown')} {size}".rstrip())
    for event in warnings(release):
        print(f"  warning: {event}")
    reader = release.reader()
    if reader and (folder := release.run_dir(needed=False)):
        pod, container = reader
        asked = ("k8scifar", "status", folder)
        done = release.kubectl.run("exec", pod, f"--container={container}", "--", *asked)
        print((done.stdout or done.stderr).strip())
    return 0


def warnings(release: Release) -> list[str]:
    """The newest warnings of the cluster about the release's objects."""
    answer = release.kubectl.run("get", "events", "--field-selector=type=Warning", "--output=json")
    if answer.returncode:
        return []
    names = {item["metadata"]["name"] for items in release.objects.values() for item in items}
    found = [event for event in json.loads(answer.stdout)["items"] if event["involvedObject"].get("name") in names]
    found.sort(key=lambda event: event.get("lastTimestamp") or event["metadata"].get("creationTimestamp") or "")
    return [
        f"{event['involvedObject']['name']}: {event.get('reason', '')}: {' '.join(event.get('message', '').split())}"
        for event in found[-EVENTS:]
    ]


def logs(release: Release, options: list[str]) -> int:
    """Follow the trainers; of pods that are not so far, show the container they are at."""
    pods = release.pods("trainer")
    if not pods:
        raise ToolError(f"release {release.name} has no training pods (make status); its run is kept: make results")
    at = {pod["metadata"]["name"]: standing(pod) for pod in pods}
    early = {name: words for name, words in at.items() if words[0] not in ("trainer", "")}
    for name, (container, words) in early.items():
        print(f"--- {name} is at {container}: {words}", flush=True)
        subprocess.run(release.kubectl.command("logs", name, f"--container={container}", "--tail=50"))
    started = [name for name, (container, _) in at.items() if container == "trainer"]
    for name in sorted(set(at) - set(early) - set(started)):
        print(f"--- {name}: {at[name][1]}", flush=True)
    if not early and started:
        chosen = f"--selector=app.kubernetes.io/instance={release.name},app.kubernetes.io/component=trainer"
        options = options or ["--follow", "--tail=100"]
        command = ["logs", chosen, "--container=trainer", "--prefix", "--max-log-requests=1000", *options]
        return subprocess.run(release.kubectl.command(*command)).returncode
    for name in started:
        print(f"--- {name}: {at[name][1]}", flush=True)
        subprocess.run(release.kubectl.command("logs", name, "--container=trainer", *(options or ["--tail=50"])))
    return 0


def tensorboard(release: Release, port: int) -> int:
    """Forward a local port to TensorBoard until Ctrl-C."""
    services = [item for item in release.objects.get("Service", []) if label(item, "component") == "tensorboard"]
    if not services:
        raise ToolError(f"release {release.name} has no TensorBoard: install it with tensorboard.enabled=true")
    (entry,) = services[0]["spec"]["ports"]
    print(f"TensorBoard at http://localhost:{port}/ while this runs", flush=True)
    name = services[0]["metadata"]["name"]
    command = release.kubectl.command("port-forward", f"service/{name}", f"{port}:{entry['port']}")
    return subprocess.run(command).returncode


def results(release: Release, target: Path, everything: bool, run_dir: str, image: str) -> int:
    """Copy the run folder to `target`: through a pod that has its volume, or one made for it."""
    run_dir = run_dir or release.run_dir()
    if reader := release.reader():
        copy(release.kubectl, *reader, run_dir, target, everything)
        return 0
    pod = reader_pod(release, image)
    name = pod["metadata"]["name"]
    print(f"no pod of the release runs: pod {name} reads its volume", flush=True)
    release.kubectl.ask("create", "--filename=-", given=json.dumps(pod))
    try:
        waited = release.kubectl.run(
            *("wait", "--for=condition=Ready", f"pod/{name}", f"--timeout={START_SECONDS}s"), timeout=START_SECONDS + 30
        )
        if waited.returncode:
            answer = release.kubectl.run("get", "pod", name, "--output=json")
            words = standing(json.loads(answer.stdout))[1] if answer.returncode == 0 else "it is gone"
            raise ToolError(f"pod {name} did not start in {START_SECONDS} s ({words}); IMAGE=... names another image")
        copy(release.kubectl, name, "reader", run_dir, target, everything)
    finally:
        release.kubectl.run("delete", "pod", name, "--wait=false", "--ignore-not-found")
    return 0


def reader_pod(release: Release, image: str) -> dict[str, Any]:
    """A pod that sleeps with the checkpoints' volume mounted, hardened as the release's own pods are."""
    carriers = release.carriers()
    template = next((item["spec"]["template"]["spec"] for item in carriers if "template" in item["spec"]), None)
    if template:
        kept = ("securityContext", "imagePullSecrets", "nodeSelector", "tolerations")
        spec = {key: template[key] for key in kept if template.get(key)}
        image = image or template["containers"][0]["image"]
        volume = next(each for each in template["volumes"] if each["name"] == "checkpoints")
    else:
        if not carriers:
            raise ToolError(f"release {release.name} left no claim of its own: install it again, then make results")
        claim = carriers[-1]["metadata"]
        notes = claim.get("annotations", {})
        uid, _, gid = notes.get("k8scifar/user", "1000:1000").partition(":")
        profile = {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
        spec = {"securityContext": profile | {"runAsUser": int(uid), "runAsGroup": int(gid)}}
        image = image or notes.get("k8scifar/image", "")
        volume = {"name": "checkpoints", "persistentVolumeClaim": {"claimName": claim["name"]}}
    if not image:
        raise ToolError("which image reads the volume? IMAGE=name:tag, any with sh and tar")
    container = {
        "name": "reader",
        "image": image,
        "command": ["sh", "-c", "trap exit TERM; sleep 3600 & wait"],
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "resources": {"requests": {"cpu": "50m", "memory": "64Mi"}, "limits": {"memory": "256Mi"}},
        "volumeMounts": [{"name": "checkpoints", "mountPath": MOUNT, "readOnly": True}],
    }
    labels = {"app.kubernetes.io/instance": release.name, "app.kubernetes.io/component": "reader"}
    # It ends by itself, should nobody be there to delete it.
    life = {"restartPolicy": "Never", "automountServiceAccountToken": False, "activeDeadlineSeconds": 3600}
    metadata = {"name": f"{release.name[:40]}-reader-{secrets.token_hex(3)}", "labels": labels}
    spec |= life | {"containers": [container], "volumes": [volume]}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}


def copy(kubectl: Kubectl, pod: str, container: str, run_dir: str, target: Path, everything: bool) -> None:
    """Copy the files of a folder in a pod to `target`, whole or not at all. Raises ToolError."""
    parent, name = str(PurePosixPath(run_dir).parent), PurePosixPath(run_dir).name
    without = [] if everything else [f"--exclude={name}/checkpoints"]
    pack = ["tar", "--create", "--file=-", f"--directory={parent}", "--exclude=.*.tmp", *without, name]
    target.mkdir(parents=True, exist_ok=True)
    said = ""
    for attempt in range(TRIES):
        with tempfile.TemporaryDirectory(prefix=".copy-", dir=target.parent) as folder:
            archive, unpacked = Path(folder, "run.tar"), Path(folder, "run")
            with archive.open("wb") as file:
                command = kubectl.command("exec", pod, f"--container={container}", "--", *pack)
                done = subprocess.run(command, stdout=file, stderr=subprocess.PIPE)
            said = " ".join(done.stderr.decode(errors="replace").split())
            if "No such file" in said or "Cannot open: No such" in said:
                raise ToolError(f"there is no run folder {run_dir} yet (make status), or say another: RUN_DIR=...")
            # tar's exit code 1: a file grew as it was read, as events do while training runs.
            if done.returncode in (0, 1) and is_whole(archive):
                unpack(archive, unpacked)
                for path in sorted((unpacked / name).iterdir()):
                    replace(path, target / path.name)
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


def replace(source: Path, target: Path) -> None:
    """Put `source` in the place of `target`."""
    if target.is_dir():
        shutil.rmtree(target)
    source.replace(target)


def report(target: Path) -> None:
    """Say what came, and what it comes to."""
    files = [path for path in target.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files) / 1e6
    names = ", ".join(sorted(path.name for path in target.iterdir()))
    print(f"copied {len(files)} files, {size:.1f} MB, to {target}: {names}")
    try:
        summary = json.loads((target / "summary.json").read_text())
        print(f"test accuracy {summary['accuracy']:.2%} after {summary['epochs']} epochs")
        print(f"open {target / 'report.html'}")
    except (OSError, ValueError, KeyError):
        print("it is not finished: there is no summary.json yet")


def main(words: list[str]) -> int:
    """The command line."""
    parser = arguments(__doc__)
    parser.add_argument("action", choices=("status", "logs", "results", "tensorboard"))
    parser.add_argument("--port", type=int, default=6006, help="local port of TensorBoard")
    parser.add_argument("--target", type=Path, help="where results go; default: results/RELEASE")
    parser.add_argument("--checkpoints", action="store_true", help="copy the checkpoints too")
    parser.add_argument("--run-dir", default="", help="the run folder as pods see it; default: the release's")
    parser.add_argument("--image", default="", help="image of the pod that reads the volume where none runs")
    args, options = parser.parse_known_args(words)
    if options and args.action != "logs":
        parser.error(f"unknown: {' '.join(options)}")
    if not re.fullmatch(r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?", args.release):
        raise ToolError(f"RELEASE={args.release} is no release's name: small letters, digits and -")
    release = Release.find(args.release, Kubectl(args.namespace, args.context))
    if args.action == "logs":
        return logs(release, options)
    if args.action == "results":
        target = args.target or Path("results") / args.release
        return results(release, target, args.checkpoints, args.run_dir, args.image)
    return tensorboard(release, args.port) if args.action == "tensorboard" else status(release)


if __name__ == "__main__":
    sys.exit(exit_code(lambda: main(sys.argv[1:])))
