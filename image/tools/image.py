"""Builds, pushes, loads and inspects the container image, with docker, podman or buildah; `make` calls it.

Choices come from the environment (make passes its command line's on): ENGINE VARIANT PLATFORMS REGISTRY IMAGE TAG
BASE PYTHON_VERSION TORCH_BACKEND EXTRAS WHEELS SOURCE CLUSTER.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from engine import (
    ROOT,
    ImageError,
    call,
    choice,
    engine,
    git,
    must_exist,
    name,
    remote_name,
    run,
    variant,
    version,
    wheel_folder,
)
from inspection import sbom, scan
from lock import lock

DOCKERFILE = "image/Dockerfile"
# Free space a build takes while it runs: the wheels, the packages twice, the image.
NEEDED = {"cpu": 4e9, "cuda": 20e9}
NO_SPACE = re.compile(r"no space left on device|disk quota exceeded", re.I)
NO_BASE = re.compile(
    r"pull access denied|manifest unknown|not found: manifest|failed to resolve|error pinging|initializing source"
    r"|(?:lookup|dial tcp|Get \"?https)[^\n]*(?:no such host|timeout|refused|unreachable|misbehaving)|short-name",
    re.I,
)
NOT_MULTI = re.compile(r"multi-platform build is not supported|does not support exporting", re.I)


def source() -> str:
    """The repository's address for the label, without a user name or token that the remote may carry."""
    address = choice("SOURCE") or git("remote", "get-url", "origin")
    if "://" not in address:
        return address if choice("SOURCE") else ""
    parts = urlsplit(address)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def build_arguments() -> dict[str, str]:
    """What the Dockerfile is told; empty values keep its defaults."""
    revision = git("rev-parse", "HEAD")
    if revision and git("status", "--porcelain", "--untracked-files=no"):
        revision += "-dirty"
    values = {
        "VARIANT": variant(),
        "VERSION": version(),
        "REVISION": revision,
        "SOURCE": source(),
        "CREATED": git("show", "-s", "--format=%cI", "HEAD"),
    }
    values |= {key: choice(key) for key in ("BASE", "PYTHON_VERSION", "TORCH_BACKEND", "EXTRAS")}
    return {key: value for key, value in values.items() if value}


def platforms() -> list[str]:
    values = [value.strip() for value in choice("PLATFORMS").split(",") if value.strip()]
    for value in values:
        if not re.fullmatch(r"linux/[a-z0-9]+(/v\d)?", value):
            raise ImageError(f"PLATFORMS has '{value}': linux/amd64 or linux/arm64, with commas between")
    return values


@contextmanager
def wheels_at_hand() -> Iterator[None]:
    """Lay the local wheels where the Dockerfile looks, for the time of the build."""
    folder, laid = wheel_folder(), []
    try:
        for wheel in sorted(folder.glob("*.whl")) if folder else []:
            target = ROOT / "image/wheels" / wheel.name
            if not target.exists():
                laid.append(target)
                try:
                    os.link(wheel, target)
                except OSError:
                    shutil.copy2(wheel, target)
        yield
    finally:
        for target in laid:
            target.unlink(missing_ok=True)


def check_space(tool: str) -> None:
    """Refuse a build that can't end, where the engine's folder can be seen from here."""
    where = {"docker": "{{.DockerRootDir}}", "podman": "{{.Store.GraphRoot}}"}
    if tool not in where:
        return
    folder = Path(run([tool, "info", "--format", where[tool]]).stdout.strip() or "/nowhere")
    if folder.is_dir() and (free := shutil.disk_usage(folder).free) < NEEDED[variant()]:
        raise ImageError(
            f"no space: {free / 1e9:.1f} GB free in {folder}, the build takes about {NEEDED[variant()] / 1e9:.0f} GB; "
            f"'{tool} system prune' frees some"
        )


def has_buildx() -> bool:
    return run(["docker", "buildx", "version"]).returncode == 0


def can_emulate(wanted: str) -> bool:
    """Whether binaries of the platform run here: its own, or through the kernel's registered emulator."""
    machine = {"amd64": "x86_64", "arm64": "aarch64"}.get(wanted.split("/")[1], wanted.split("/")[1])
    here = {"arm64": "aarch64", "AMD64": "x86_64"}.get(platform.machine(), platform.machine())
    formats = Path("/proc/sys/fs/binfmt_misc")
    # Docker Desktop (no Linux here) emulates by itself.
    return machine == here or platform.system() != "Linux" or (formats / f"qemu-{machine}").exists()


def build_command(tool: str, push: bool = False) -> list[str]:
    """The builder's command line. Raises ImageError where the builder can't do what is asked."""
    wanted, arguments = platforms(), build_arguments()
    given = [f"--build-arg={key}={value}" for key, value in arguments.items()] + ["--file", DOCKERFILE]
    for value in wanted:
        if not can_emulate(value):
            raise ImageError(f"{value} binaries do not run here: install qemu-user-static and binfmt-support")
    start = [tool, "build", *(["--layers"] if tool == "buildah" else [])]
    if len(wanted) <= 1:
        single = [f"--platform={wanted[0]}"] if wanted else []
        return [*start, *single, *given, "--tag", name(), "."]
    if tool != "docker":
        return [*start, f"--platform={','.join(wanted)}", *given, "--manifest", name(), "."]
    if not has_buildx():
        raise ImageError("several PLATFORMS need docker's buildx: install docker-buildx, or use ENGINE=podman")
    if push:
        output = ["--push", "--tag", remote_name()]
    else:  # docker's own store takes one platform alone
        archive = Path("dist") / f"{name().replace('/', '-').replace(':', '-')}.oci.tar"
        (ROOT / "dist").mkdir(exist_ok=True)
        output = [f"--output=type=oci,dest={archive}", "--tag", name()]
    return ["docker", "buildx", "build", f"--platform={','.join(wanted)}", *given, *output, "."]


def build(push: bool = False) -> None:
    tool = engine()
    command = build_command(tool, push)
    check_space(tool)
    print(f"building {name()} with {tool}", flush=True)
    environment = dict(os.environ)
    if command[:2] == ["docker", "build"] and not has_buildx():
        environment.setdefault("DOCKER_BUILDKIT", "1" if client_has_buildkit() else "0")
    started = time.monotonic()
    with wheels_at_hand():
        stream(command, environment)
    print(f"built {name()} in {time.monotonic() - started:.0f} s{size_text(tool)}")
    if command[:3] == ["docker", "buildx", "build"] and not push:
        print(f"it is in {next(word for word in command if word.startswith('--output')).split('dest=')[1]}")


def client_has_buildkit() -> bool:
    """Docker before 23 has BuildKit in its client; later ones need buildx for it."""
    found = re.match(r"(\d+)", run(["docker", "version", "--format", "{{.Client.Version}}"]).stdout)
    return bool(found) and int(found[1]) < 23


def stream(command: Sequence[str], environment: dict[str, str]) -> None:
    """Run a builder, its output shown as it comes, its well-known failures told in one line."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    with subprocess.Popen(command, cwd=ROOT, env=environment, **pipes) as process:
        seen: list[str] = []
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            seen = [*seen[-199:], line]
    if process.returncode == 0:
        return
    output = "".join(seen)
    if NO_SPACE.search(output):
        raise ImageError(f"no space left for the image; '{command[0]} system prune' frees some")
    if NOT_MULTI.search(output):
        raise ImageError("docker's builder takes one platform alone: 'docker buildx create --use' makes another")
    if NO_BASE.search(output):
        raise ImageError("the base image can't be pulled: check the network, or name another with BASE=name:tag")
    raise ImageError(f"{' '.join(command[:2])} failed (exit code {process.returncode}); its messages are above")


def size_text(tool: str) -> str:
    if tool == "buildah" or len(platforms()) > 1:
        return ""
    size = run([tool, "image", "inspect", "--format", "{{.Size}}", name()]).stdout.strip()
    return f", {int(size) / 1e6:.0f} MB unpacked" if size.isdigit() else ""


def push() -> None:
    target = remote_name()
    tool = engine()
    if len(platforms()) > 1 and tool == "docker":
        build(push=True)
    elif len(platforms()) > 1:
        call([tool, "manifest", "push", "--all", name(), f"docker://{target}"])
    else:
        must_exist(tool)
        if tool == "buildah":
            call(["buildah", "push", name(), f"docker://{target}"])
        else:
            call([tool, "tag", name(), target])
            call([tool, "push", target])
    repository, _, tag = target.rpartition(":")
    print(f"pushed {target}; for helm: --set image.repository={repository} --set image.tag={tag}")


def cluster() -> str:
    """Where to load: CLUSTER, else kubectl's current context, else the one that is installed. Raises ImageError."""
    known = ("k3s", "kind", "minikube")
    asked = choice("CLUSTER")
    if asked and asked not in known:
        raise ImageError(f"unknown CLUSTER '{asked}': {', '.join(known)}")
    installed = [tool for tool in ([asked] if asked else known) if shutil.which(tool)]
    if not installed:
        what = f"{asked} is not installed" if asked else "neither k3s, kind nor minikube is here"
        raise ImageError(f"{what}: use make push REGISTRY=host/name")
    if len(installed) == 1:
        return installed[0]
    context = run(["kubectl", "config", "current-context"]).stdout.strip() if shutil.which("kubectl") else ""
    for tool in installed:
        if context == tool or context.startswith(f"{tool}-"):
            return tool
    raise ImageError(f"{' and '.join(installed)} are here: say which with CLUSTER={installed[0]}")


def load() -> None:
    where = cluster()
    tool = engine()
    must_exist(tool)
    if where == "kind" and tool == "docker":
        call(["kind", "load", "docker-image", name(), *kind_cluster()])
    elif where == "minikube" and tool == "docker":
        call(["minikube", "image", "load", name()])
    else:
        archive = ROOT / "dist" / "image.tar"
        archive.parent.mkdir(exist_ok=True)
        archive.unlink(missing_ok=True)
        try:
            save = {"docker": ["docker", "save", "--output", str(archive), name()]}
            save["podman"] = ["podman", "save", "--format=docker-archive", "--output", str(archive), name()]
            save["buildah"] = ["buildah", "push", name(), f"docker-archive:{archive}:{name()}"]
            call(save[tool])
            if where == "k3s":
                sudo = [] if os.geteuid() == 0 else ["sudo"]
                call([*sudo, "k3s", "ctr", "images", "import", str(archive)])
            elif where == "kind":
                call(["kind", "load", "image-archive", str(archive), *kind_cluster()])
            else:
                call(["minikube", "image", "load", str(archive)])
        finally:
            archive.unlink(missing_ok=True)
    print(f"loaded {name()} into {where}")
    if where == "k3s":
        print(f"the other nodes need it too: {tool} save {name()} | ssh NODE sudo k3s ctr images import -")


def kind_cluster() -> list[str]:
    """kind's cluster of kubectl's current context, where it is one of kind's."""
    context = run(["kubectl", "config", "current-context"]).stdout.strip() if shutil.which("kubectl") else ""
    return ["--name", context.removeprefix("kind-")] if context.startswith("kind-") else []


def main() -> int:
    actions = {"build": build, "push": push, "load": load, "sbom": sbom, "scan": scan, "lock": lock}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=actions)
    try:
        actions[parser.parse_args().action]()
    except ImageError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
