"""Make or delete a throw-away cluster of two workers on this machine. `make up` and `make down` call it."""

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
INSIDE = "/k8scifar"  # where values/kind.yaml and values/minikube.yaml expect the shared folder
CONTAINER_USER = 1000  # of the pods if root calls this: they never run as root


# For each tool kubectl's context and the commands, in which {folder} and {image} are replaced.
TOOLS = {
    "kind": {
        "context": f"kind-{NAME}",
        "list": "kind get clusters",
        "create": f"kind create cluster --name={NAME} --config=- --wait=180s",
        "load": f"kind load docker-image {{image}} --name={NAME}",
        "delete": f"kind delete cluster --name={NAME}",
    },
    "k3d": {
        "context": f"k3d-{NAME}",
        "list": "k3d cluster list --no-headers",
        "create": f"k3d cluster create {NAME} --agents=2 --volume={{folder}}:{INSIDE}@all --wait",
        "load": f"k3d image import {{image}} --cluster={NAME}",
        "delete": f"k3d cluster delete {NAME}",
    },
    "minikube": {
        "context": NAME,
        "list": "minikube profile list --output=json",
        "create": f"minikube start --profile={NAME} --driver=docker --nodes=2 --memory=4g --mount"
        f" --mount-string={{folder}}:{INSIDE}",
        "load": f"minikube --profile={NAME} image load {{image}}",
        "delete": f"minikube delete --profile={NAME}",
    },
}


def chosen(asked: str) -> str:
    """The tool asked for, else the first that is installed. Raises ToolError."""
    if asked and asked not in TOOLS:
        raise ToolError(f"unknown CLUSTER '{asked}': {', '.join(TOOLS)}")
    found = [tool for tool in ([asked] if asked else TOOLS) if shutil.which(tool)]
    if not found:
        what = f"{asked} is not installed" if asked else "neither kind, k3d nor minikube is installed"
        raise ToolError(f"{what}: install one (and docker) for a cluster here, or use your own: make install")
    return found[0]


def ready() -> None:
    """Raise ToolError unless kubectl is installed and docker works."""
    if not shutil.which("kubectl"):
        raise ToolError("kubectl is not on PATH; install it")
    if not shutil.which("docker"):
        raise ToolError("docker is not installed; the machines of the throw-away cluster are its containers")
    if reason := engine.why_silent("docker"):
        raise ToolError(f"docker does not answer ({reason}); start it, e.g. sudo systemctl start docker")


def command(tool: str, task: str, **replaced: str | Path) -> list[str]:
    """The words of a tool's command."""
    return [word.format(**replaced) for word in TOOLS[tool][task].split()]


def exists(tool: str) -> bool:
    """Whether the cluster exists."""
    text = subprocess.run(command(tool, "list"), text=True, capture_output=True).stdout
    if tool == "minikube":
        try:
            return any(profile["Name"] == NAME for profile in json.loads(text).get("valid", []))
        except (ValueError, AttributeError):
            return False
    return any(line.split()[:1] == [NAME] for line in text.splitlines())


def create(tool: str, folder: Path) -> None:
    """Make a cluster of two workers that share a folder of this machine."""
    mount = {"extraMounts": [{"hostPath": str(folder), "containerPath": INSIDE}]}
    nodes = [{"role": "control-plane"}, {"role": "worker"} | mount, {"role": "worker"} | mount]
    config = json.dumps({"kind": "Cluster", "apiVersion": "kind.x-k8s.io/v1alpha4", "nodes": nodes})
    call(command(tool, "create", folder=folder), given=config if tool == "kind" else None)


def load(tool: str) -> None:
    """Put the image into every node; build it first if it is missing."""
    image = engine.name()
    if engine.run(["docker", "image", "inspect", image]).returncode:
        call([sys.executable, str(ROOT / "image/tools/image.py"), "build"], environment={"ENGINE": "docker"})
    call(command(tool, "load", image=image))


def install(tool: str, release: str, namespace: str, uid: int, options: list[str]) -> None:
    """Install or upgrade the chart."""
    try:
        found = str(helm_finder.find())
    except LookupError as error:
        raise ToolError(str(error)) from None
    repository, _, tag = engine.name().rpartition(":")
    values = "minikube.yaml" if tool == "minikube" else "kind.yaml"
    context = TOOLS[tool]["context"]
    call(
        [
            *(found, "upgrade", "--install", release, str(ROOT / "chart"), f"--values={ROOT / 'values' / values}"),
            *(f"--kube-context={context}", f"--namespace={namespace}", "--create-namespace"),
            *(f"--set=user.uid={uid}", f"--set=image.repository={repository}", f"--set=image.tag={tag}", *options),
        ]
    )


def up(tool: str, folder: Path, release: str, namespace: str, options: list[str]) -> int:
    """Make the cluster if it is missing, load the image and install the chart."""
    ready()
    folder.mkdir(parents=True, exist_ok=True)
    uid = os.getuid()
    if uid == 0:
        os.chown(folder, CONTAINER_USER, CONTAINER_USER)
        uid = CONTAINER_USER
    if exists(tool):
        print(f"the {tool} cluster {NAME} exists already", flush=True)
    else:
        create(tool, folder)
    load(tool)
    install(tool, release, namespace, uid, options)
    context = TOOLS[tool]["context"]
    print(f"\nthe training is in {folder}/runs; kubectl's context is now {context}. What next:")
    print("  make status    make logs    make tensorboard-cluster    make results    make down")
    return 0


def down(asked: str, folder: Path) -> int:
    """Delete the cluster, but not the folder with data and runs."""
    tools = [chosen(asked)] if asked else [tool for tool in TOOLS if shutil.which(tool)] or [chosen("")]
    there = [tool for tool in tools if exists(tool)]
    if not there:
        print(f"there is no cluster {NAME} of {' or '.join(tools)}: nothing to do")
    for tool in there:
        call(command(tool, "delete"))
    if folder.exists():
        print(f"data and runs stay in {folder}")
    return 0


def call(words: list[str], given: str | None = None, environment: dict[str, str] | None = None) -> None:
    """Print and run a command. Raises ToolError if it fails."""
    print("+ " + " ".join(words), flush=True)
    done = subprocess.run(words, input=given, text=True, env=os.environ | (environment or {}))
    if done.returncode:
        raise ToolError(f"'{' '.join(Path(word).name for word in words[:3])}' failed; its messages are above")


def main(words: list[str]) -> int:
    """Run the command line."""
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
