"""The daily commands for a training in a cluster: status, logs, results, TensorBoard. `make` calls them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from claims import claim_lines, machines, replacement_lines
from events import warnings
from kube import Kubectl, Release, ToolError, arguments, exit_code, listening
from kube_objects import label, named
from pod_states import lost, state_of, workload_lines
from results import results


def status(release: Release) -> int:
    """Print pods, volumes, warnings and the progress of the training."""
    nodes, pods = release.nodes(machines(release)), release.pods()
    away = [named(pod) for pod in pods if lost(pod, nodes)]
    print("\n".join(workload_lines(release, away)))
    for pod in pods:
        state = " ".join(filter(None, state_of(pod, nodes)))
        where = f" on {pod['spec']['nodeName']}" if pod["spec"].get("nodeName") else ""
        print(f"  pod {named(pod)}{where}: {state}")
    for line in [*replacement_lines(release, nodes), *claim_lines(release)]:
        print(line)
    for warning in warnings(release):
        print(f"  warning: {warning}")
    sys.stdout.flush()
    text = progress(release)
    # The run folder has the last progress, not who has been lost since.
    if text and (missing := [named(pod) for pod in release.pods("trainer") if named(pod) in away]):
        name, _, words = text.partition(": ")
        text = f"{name}: waits until {' and '.join(missing)} is back; before: {words}"
    if text:
        print(text)
    return 0


def progress(release: Release) -> str:
    """The progress of the training from its run folder; empty if no pod can read it."""
    folder = release.run_dir(needed=False)
    done = release.inside("k8scifar", "status", folder) if folder else None
    if not done:
        return ""
    if done.stdout.strip():
        return done.stdout.strip()
    return f"the run's state can't be read: {(done.stderr.strip().splitlines() or ['no answer'])[-1]}"


def logs(release: Release, options: list[str]) -> int:
    """Follow the trainers' logs; if some pods have not come so far, print each pod's log at its present container."""
    pods = release.pods("trainer")
    if not pods:
        raise ToolError(f"release {release.name} has no training pods (make status); its run is kept: make results")
    states = {named(pod): state_of(pod) for pod in pods}
    early = {name: state for name, state in states.items() if state[0] not in ("trainer", "")}
    started = [name for name, (container, _) in states.items() if container == "trainer"]

    def show(title: str, *words: str) -> None:
        print(f"--- {title}", flush=True)
        subprocess.run(release.kubectl.command("logs", *words))

    for name, (container, words) in early.items():
        show(f"{name} is at {container}: {words}", name, f"--container={container}", "--tail=50")
    for name in sorted(set(states) - set(early) - set(started)):
        print(f"--- {name}: {states[name][1]}", flush=True)
    if not early and started:
        chosen = f"--selector=app.kubernetes.io/instance={release.name},app.kubernetes.io/component=trainer"
        options = options or ["--follow", "--tail=100"]
        command = ["logs", chosen, "--container=trainer", "--prefix", "--max-log-requests=1000", *options]
        return subprocess.run(release.kubectl.command(*command)).returncode
    for name in started:
        show(f"{name}: {states[name][1]}", name, "--container=trainer", *(options or ["--tail=50"]))
    return 0


def tensorboard(release: Release, host: str, port: str) -> int:
    """Forward a local port to TensorBoard until Ctrl-C."""
    services = [item for item in release.objects.get("Service", []) if label(item, "component") == "tensorboard"]
    if not services:
        raise ToolError(f"release {release.name} has no TensorBoard: install it with tensorboard.enabled=true")
    number = listening(host, port, "make tensorboard-cluster")
    (entry,) = services[0]["spec"]["ports"]
    print(f"TensorBoard at http://{host}:{port}/ while this runs", flush=True)
    forward = ("port-forward", f"--address={host}", f"service/{named(services[0])}", f"{number}:{entry['port']}")
    return subprocess.run(release.kubectl.command(*forward)).returncode


def main(words: list[str]) -> int:
    """Run the command line."""
    parser = arguments(__doc__)
    parser.add_argument("action", choices=("status", "logs", "results", "tensorboard"))
    parser.add_argument("--host", default="localhost", help="local address of TensorBoard")
    parser.add_argument("--port", default="6006", help="local port of TensorBoard")
    parser.add_argument("--target", type=Path, help="folder for results; default: results/RELEASE, or one beside it")
    parser.add_argument("--checkpoints", action="store_true", help="copy the checkpoints too")
    parser.add_argument("--run-dir", default="", help="the run folder as pods see it; default: the release's")
    parser.add_argument("--image", default="", help="image of the pod that reads the volume if no other pod can")
    parser.add_argument("--claim", default="", help="the claim to read; default: the one in use")
    args, options = parser.parse_known_args(words)
    if options and args.action != "logs":
        parser.error(f"unknown: {' '.join(options)}")
    if not re.fullmatch(r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?", args.release):
        raise ToolError(f"RELEASE={args.release} is not a release's name: small letters, digits and -")
    release = Release.find(args.release, Kubectl(args.namespace, args.context))
    if args.action == "logs":
        return logs(release, options)
    if args.action == "results":
        return results(release, args.target, args.checkpoints, args.run_dir, args.image, args.claim)
    return tensorboard(release, args.host, args.port) if args.action == "tensorboard" else status(release)


if __name__ == "__main__":
    sys.exit(exit_code(lambda: main(sys.argv[1:])))
