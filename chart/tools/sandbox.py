"""A throw-away cluster of two workers on this machine, by kind, k3d or minikube. `make up` and `make down` call it."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import helm as helm_finder
from kube import ROOT, ToolError, exit_code

sys.path.insert(0, str(ROOT / "image" / "tools"))
import engine

NAME = "k8scifar"
TOOLS = ("kind", "k3d", "minikube")
CONTEXTS = {"kind": f"kind-{NAME}", "k3d": f"k3d-{NAME}", "minikube": NAME}
INSIDE = "/k8scifar"  # where values/kind.yaml and values/minikube.yaml look for the shared folder
CONTAINER_USER = 1000  # where root runs this: the pods never run as root


def chosen(asked: str) -> str:
    """The tool: the one that is asked for, else the first that is installed. Raises ToolError."""
    if asked and asked not in TOOLS:
        raise ToolError(f"unknown CLUSTER '{asked}': {', '.join(TOOLS)}")
    found = [tool for tool in ([asked] if asked else TOOLS) if shutil.which(tool)]
    if not found:
        what = f"{asked} is not installed" if asked else "neither kind, k3d nor minikube is installed"
        raise ToolError(f"{what}: install one (and docker) for a cluster here, or use your own: make install")
    return found[0]


def ready() -> None:
    """Raise ToolError unless kubectl, and docker with its daemon, are here."""
    if not shutil.which("kubectl"):
        raise ToolError("kubectl is not on PATH; install it")
    if not shutil.which("docker"):
        raise ToolError("docker is not installed: the throw-away cluster's machines are its containers")
    if reason := engine.why_silent("docker"):
        raise ToolError(f"docker does not answer ({reason}); start it, e.g. sudo systemctl start docker")


def exists(tool: str) -> bool:
    """Whether the cluster is there."""
    command = {
        "kind": ["kind", "get", "clusters"],
        "k3d": ["k3d", "cluster", "list", "--no-headers"],
        "minikube": ["minikube", "profile", "list", "--output=json"],
    }[tool]
    text = subprocess.run(command, text=True, capture_output=True).stdout
    if tool == "minikube":
        try:
            return any(profile["Name"] == NAME for profile in json.loads(text).get("valid", []))
        except (ValueError, AttributeError):
            return False
    return any(line.split()[:1] == [NAME] for line in text.splitlines())


def create(tool: str, folder: Path) -> None:
    """Make a cluster of two workers that share `folder` of this machine."""
    mount = {"extraMounts": [{"hostPath": str(folder), "containerPath": INSIDE}]}
    nodes = [{"role": "control-plane"}, {"role": "worker"} | mount, {"role": "worker"} | mount]
    config = json.dumps({"kind": "Cluster", "apiVersion": "kind.x-k8s.io/v1alpha4", "nodes": nodes})
    command = {
        "kind": ["kind", "create", "cluster", f"--name={NAME}", "--config=-", "--wait=180s"],
        "k3d": ["k3d", "cluster", "create", NAME, "--agents=2", f"--volume={folder}:{INSIDE}@all", "--wait"],
        "minikube": [
            *("minikube", "start", f"--profile={NAME}", "--driver=docker", "--nodes=2", "--memory=4g"),
            *("--mount", f"--mount-string={folder}:{INSIDE}"),
        ],
    }[tool]
    call(command, given=config if tool == "kind" else None)


def load(tool: str) -> None:
    """Put the image into every node; build it first where it is missing."""
    image = engine.name()
    if engine.run(["docker", "image", "inspect", image]).returncode:
        call([sys.executable, str(ROOT / "image/tools/image.py"), "build"], environment={"ENGINE": "docker"})
    call(
        {
            "kind": ["kind", "load", "docker-image", image, f"--name={NAME}"],
            "k3d": ["k3d", "image", "import", image, f"--cluster={NAME}"],
            "minikube": ["minikube", f"--profile={NAME}", "image", "load", image],
        }[tool]
    )


def install(tool: str, release: str, namespace: str, uid: int, options: list[str]) -> None:
    """Install or upgrade the chart."""
    try:
        found = str(helm_finder.find())
    except LookupError as error:
        raise ToolError(str(error)) from None
    repository, _, tag = engine.name().rpartition(":")
    values = "minikube.yaml" if tool == "minikube" else "kind.yaml"
    call(
        [
            *(found, "upgrade", "--install", release, str(ROOT / "chart"), f"--values={ROOT / 'values' / values}"),
            *(f"--kube-context={CONTEXTS[tool]}", f"--namespace={namespace}", "--create-namespace"),
            *(f"--set=user.uid={uid}", f"--set=image.repository={repository}", f"--set=image.tag={tag}", *options),
        ]
    )


def up(tool: str, folder: Path, release: str, namespace: str, options: list[str]) -> int:
    """From nothing to a training in a cluster; what is there already is used."""
    ready()
    folder.mkdir(parents=True, exist_ok=True)
    uid = os.getuid()
    if uid == 0:
        os.chown(folder, CONTAINER_USER, CONTAINER_USER)
        uid = CONTAINER_USER
    if exists(tool):
        print(f"the {tool} cluster {NAME} is there already", flush=True)
    else:
        create(tool, folder)
    load(tool)
    install(tool, release, namespace, uid, options)
    context = CONTEXTS[tool]
    print(f"\nthe training is in {folder}/runs; kubectl's context is now {context}. What next:")
    print("  make status    make logs    make tensorboard-cluster    make results    make down")
    return 0


def down(asked: str, folder: Path) -> int:
    """Delete the cluster; the folder with data and runs stays."""
    tools = [chosen(asked)] if asked else [tool for tool in TOOLS if shutil.which(tool)] or [chosen("")]
    there = [tool for tool in tools if exists(tool)]
    if not there:
        print(f"there is no cluster {NAME} of {' or '.join(tools)}: nothing to do")
    for tool in there:
        call(
            {
                "kind": ["kind", "delete", "cluster", f"--name={NAME}"],
                "k3d": ["k3d", "cluster", "delete", NAME],
                "minikube": ["minikube", "delete", f"--profile={NAME}"],
            }[tool]
        )
    if folder.exists():
        print(f"data and runs stay in {folder}")
    return 0


def call(command: list[str], given: str | None = None, environment: dict[str, str] | None = None) -> None:
    """Run a command, its output shown. Raises ToolError where it fails."""
    print("+ " + " ".join(command), flush=True)
    done = subprocess.run(command, input=given, text=True, env=os.environ | (environment or {}))
    if done.returncode:
        raise ToolError(f"'{' '.join(Path(word).name for word in command[:3])}' failed; its messages are above")


def main(words: list[str]) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("action", choices=("up", "down"))
    parser.add_argument("--cluster", default="", help="kind, k3d or minikube; default: the first that is installed")
    parser.add_argument("--release", default="cifar")
    parser.add_argument("--namespace", default="default")
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "k8scifar" / "sandbox",
        help="folder of this machine that the workers share",
    )
    args, options = parser.parse_known_args(words)
    if args.action == "down":
        return down(args.cluster, args.folder)
    return up(chosen(args.cluster), args.folder.resolve(), args.release, args.namespace, options)


if __name__ == "__main__":
    sys.exit(exit_code(lambda: main(sys.argv[1:])))
