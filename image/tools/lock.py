"""Renews the locks of the image's packages."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from engine import ROOT, ImageError, call, choice, wheel_folder


def lock() -> None:
    """Renew the locks: the versions they have, where they still fit; UPGRADE=1 takes the newest."""
    uv = next((found for found in (ROOT / ".venv/bin/uv", shutil.which("uv")) if found and Path(found).exists()), None)
    if not uv:
        raise ImageError("uv is missing: make venv")
    common, cuda, remote = (ROOT / f"image/requirements{part}.lock" for part in ("", "-cuda", "-remote"))
    pins: dict[str, str] = {}
    for file in (common, cuda, remote):
        pins |= versions(file.read_text()) if file.exists() and not choice("UPGRADE") else {}
    folder = wheel_folder()
    sources = ["--find-links", str(folder)] if folder else ["--torch-backend", "cpu"]
    # torch's own lines go first: without its local part their version would mean the CUDA build.
    found = compiled(str(uv), without_torch(pins), sources)
    write_lock(common, found)
    # What EXTRAS=remote adds.
    more = compiled(str(uv), without_torch(found | pins), [*sources, "--extra", "remote"])
    write_lock(remote, {name: version for name, version in more.items() if name not in found})
    # The CUDA build of the registry adds NVIDIA's packages; the rest is the same.
    both = compiled(str(uv), found | without_torch(pins), [])
    write_lock(cuda, {name: version for name, version in both.items() if name not in found})


def versions(text: str) -> dict[str, str]:
    """The pins of a lock. CPU and CUDA builds are one version: which is taken is the variant's choice."""
    return dict(re.findall(r"(?m)^([a-z0-9.-]+)==([^+\s]+)", text))


def without_torch(pins: dict[str, str]) -> dict[str, str]:
    return {name: version for name, version in pins.items() if name not in ("torch", "torchvision")}


def compiled(uv: str, pins: dict[str, str], sources: list[str]) -> dict[str, str]:
    """All packages that the project needs, in the pinned versions as far as they fit."""
    with tempfile.NamedTemporaryFile("w+", suffix=".txt") as output:
        output.writelines(f"{name}=={version}\n" for name, version in pins.items())
        output.flush()
        call(
            [uv, "pip", "compile", "--quiet", "--python-version", choice("PYTHON_VERSION", "3.11"), *sources,
             "--python-platform", "linux", "--constraint", "trainer/constraints.txt", "--output-file", output.name,
             "trainer/pyproject.toml"],
            cwd=ROOT, stdout=subprocess.DEVNULL, env=os.environ | {"UV_FIND_LINKS": ""},
        )  # fmt: skip
        return versions(Path(output.name).read_text())


def write_lock(target: Path, pins: dict[str, str]) -> None:
    target.write_text("".join(f"{name}=={version}\n" for name, version in sorted(pins.items())))
    print(f"wrote {target.relative_to(ROOT)}, {len(pins)} packages")
