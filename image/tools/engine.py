"""The container engine and what the image is called; choices come from the environment."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ENGINES = ("docker", "podman", "buildah")
VARIANTS = ("cpu", "cuda")


class ImageError(Exception):
    """One line that says what is wrong and what to do."""


def choice(name: str, default: str = "") -> str:
    return os.environ.get(name, "").strip() or default


def run(command: Sequence[str], **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, text=True, capture_output=True, **options)


def call(command: Sequence[str], **options) -> None:
    if subprocess.run(command, **options).returncode:
        raise ImageError(f"'{' '.join(command[:3])}' failed; its messages are above")


def engine(needs_run: bool = False) -> str:
    """The container engine to use: ENGINE, or the first that is installed and answers. Raises ImageError."""
    usable = [name for name in ENGINES if not (needs_run and name == "buildah")]
    asked = choice("ENGINE")
    if asked and asked not in usable:
        raise ImageError(f"ENGINE={asked} will not do here: {', '.join(usable)}")
    installed = [name for name in ([asked] if asked else usable) if shutil.which(name)]
    if not installed:
        what = f"ENGINE={asked} is not installed" if asked else "no container engine found"
        raise ImageError(f"{what}: install {' or '.join(usable)}")
    silent = []
    for name in installed:
        reason = why_silent(name)
        if reason is None:
            return name
        silent.append(f"{name} is installed but does not answer ({reason})")
    raise ImageError("; ".join(silent) + "; start it, e.g. sudo systemctl start docker")


def why_silent(name: str) -> str | None:
    """Why an installed engine can't be used; None: it can."""
    command = {"docker": ["version", "--format", "{{.Server.Version}}"], "podman": ["info"], "buildah": ["info"]}[name]
    answer = run([name, *command])
    if answer.returncode == 0:
        return None
    lines = [line for line in (answer.stderr or answer.stdout).strip().splitlines() if line.strip()]
    last = lines[-1].strip() if lines else f"exit code {answer.returncode}"
    return "you may not use its socket: join the group docker, or use sudo" if "permission denied" in last else last


def version() -> str:
    text = (ROOT / "trainer/src/k8scifar/__init__.py").read_text()
    found = re.search(r'__version__ = "([^"]+)"', text)
    if not found:
        raise ImageError("no __version__ in trainer/src/k8scifar/__init__.py")
    return found[1]


def variant() -> str:
    value = choice("VARIANT", "cpu")
    if value not in VARIANTS:
        raise ImageError(f"unknown VARIANT '{value}': {' or '.join(VARIANTS)}")
    return value


def name() -> str:
    """The image's name and tag, without a registry; the CUDA build has its own tag."""
    tag = choice("TAG", version() + ("" if variant() == "cpu" else f"-{variant()}"))
    return f"{choice('IMAGE', 'k8scifar')}:{tag}"


def remote_name() -> str:
    registry = choice("REGISTRY").rstrip("/")
    if not registry:
        raise ImageError("REGISTRY is missing: make push REGISTRY=host/name")
    if "://" in registry or re.search(r"\s", registry):
        raise ImageError(f"REGISTRY '{registry}' must be host/name, without a scheme or spaces")
    return f"{registry}/{name()}"


def git(*arguments: str) -> str:
    return run(["git", "-C", str(ROOT), *arguments]).stdout.strip() if shutil.which("git") else ""


def wheel_folder() -> Path | None:
    """The folder of wheels that pip is configured with here, if torch is in it; WHEELS says another."""
    asked = choice("WHEELS")
    if asked:
        if not list(Path(asked).glob("*.whl")):
            raise ImageError(f"WHEELS={asked} has no wheels in it")
        return Path(asked)
    if variant() == "cuda":  # what pip finds here may be the CPU build
        return None
    for key in (":env:.find-links", "global.find-links"):
        for word in run([sys.executable, "-m", "pip", "config", "get", key]).stdout.split():
            folder = Path(word.removeprefix("file://"))
            if folder.is_dir() and list(folder.glob("torch-*.whl")):
                return folder
    return None


def must_exist(tool: str) -> None:
    check = ["inspect", "--type", "image"] if tool == "buildah" else ["image", "inspect"]
    if run([tool, *check, name()]).returncode:
        raise ImageError(f"there is no image {name()}: make image")
