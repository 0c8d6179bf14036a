"""What people do every day with a training in a cluster: status, logs, results, TensorBoard. `make` calls it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from claims import claims, machines, replacements
from events import news
from kube import Kubectl, Release, ToolError, arguments, exit_code, listening
from kube_objects import label
from pod_states import lost, standing, workload
from results import results


def status(release: Release) -> int:
    """Pods, volumes, warnings, and what the training says of itself."""
    nodes = release.nodes(machines(release))
    pods = release.pods()
    away = [pod["metadata"]["name"] for pod in pods if lost(pod, nodes)]
    print("\n".join(workload(release, away)))
    for pod in pods:
        container, words = standing(pod, nodes)
        where = f" on {pod['spec']['nodeName']}" if pod["spec"].get("nodeName") else ""
        print(f"  pod {pod['metadata']['name']}{where}: {f'{container} ' if container else ''}{words}")
    for line in [*replacements(release, nodes), *claims(release)]:
        print(line)
    for event in news(release):
        print(f"  warning: {event}")
    sys.stdout.flush()
    said = progress(release)
    # The run folder knows how far training came, not who is away since.
    waits = [pod["metadata"]["name"] for pod in release.pods("trainer") if pod["metadata"]["name"] in away]
    if waits and said:
        name, _, words = said.partition(": ")
        said = f"{name}: stands still until {' and '.join(waits)} is back; before: {words}"
    if said:
        print(said)
    return 0


def progress(release: Release) -> str:
    """What the run folder says of the training; empty where no pod can read it."""
    reader, folder = release.reader(), release.run_dir(needed=False)
    if not (reader and folder):
        return ""
    pod, container = reader
    asked = ("k8scifar", "status", folder)
    done = release.kubectl.run("exec", pod, f"--container={container}", "--", *asked, timeout=30)
    if done.stdout.strip():
        return done.stdout.strip()
    return f"the run's own state can't be read in pod {pod}: {(done.stderr.strip().splitlines() or ['no answer'])[-1]}"


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


def tensorboard(release: Release, host: str, port: str) -> int:
    """Forward a local port to TensorBoard until Ctrl-C."""
    services = [item for item in release.objects.get("Service", []) if label(item, "component") == "tensorboard"]
    if not services:
        raise ToolError(f"release {release.name} has no TensorBoard: install it with tensorboard.enabled=true")
    number = listening(host, port, "make tensorboard-cluster")
    (entry,) = services[0]["spec"]["ports"]
    print(f"TensorBoard at http://{host}:{port}/ while this runs", flush=True)
    name = services[0]["metadata"]["name"]
    forward = ("port-forward", f"--address={host}", f"service/{name}", f"{number}:{entry['port']}")
    return subprocess.run(release.kubectl.command(*forward)).returncode


def main(words: list[str]) -> int:
    """The command line."""
    parser = arguments(__doc__)
    parser.add_argument("action", choices=("status", "logs", "results", "tensorboard"))
    parser.add_argument("--host", default="localhost", help="where TensorBoard is listened at here")
    parser.add_argument("--port", default="6006", help="local port of TensorBoard")
    parser.add_argument(
        "--target", type=Path, help="where results go; default: results/RELEASE, or one of its own beside"
    )
    parser.add_argument("--checkpoints", action="store_true", help="copy the checkpoints too")
    parser.add_argument("--run-dir", default="", help="the run folder as pods see it; default: the release's")
    parser.add_argument("--image", default="", help="image of the pod that reads the volume where none runs")
    parser.add_argument("--claim", default="", help="of several claims, the one to read; default: the one in use")
    args, options = parser.parse_known_args(words)
    if options and args.action != "logs":
        parser.error(f"unknown: {' '.join(options)}")
    if not re.fullmatch(r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?", args.release):
        raise ToolError(f"RELEASE={args.release} is no release's name: small letters, digits and -")
    release = Release.find(args.release, Kubectl(args.namespace, args.context))
    if args.action == "logs":
        return logs(release, options)
    if args.action == "results":
        return results(release, args.target, args.checkpoints, args.run_dir, args.image, args.claim)
    return tensorboard(release, args.host, args.port) if args.action == "tensorboard" else status(release)


if __name__ == "__main__":
    sys.exit(exit_code(lambda: main(sys.argv[1:])))
