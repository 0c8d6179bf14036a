"""Lists what is in the image, and looks for known vulnerabilities in it."""

from __future__ import annotations

import shutil

from engine import ROOT, ImageError, call, engine, must_exist, name


def sbom() -> None:
    target = ROOT / "dist" / f"{name().replace('/', '-').replace(':', '-')}.sbom.json"
    commands = {
        "syft": ["syft", "docker-archive:ARCHIVE", "--output", f"spdx-json={target}"],
        "trivy": ["trivy", "image", "--input", "ARCHIVE", "--format", "spdx-json", "--output", str(target)],
    }
    inspect(commands, "an SBOM")
    print(f"wrote {target.relative_to(ROOT)}")


def scan() -> None:
    failing = ["--exit-code=1"]
    commands = {
        "trivy": ["trivy", "image", "--input", "ARCHIVE", "--ignore-unfixed", "--severity=HIGH,CRITICAL", *failing],
        "grype": ["grype", "docker-archive:ARCHIVE", "--only-fixed", "--fail-on=high"],
    }
    inspect(commands, "a scan")


def inspect(commands: dict[str, list[str]], what: str) -> None:
    found = next((command for tool, command in commands.items() if shutil.which(tool)), None)
    if not found:
        raise ImageError(f"{what} needs {' or '.join(commands)} on the path: install one")
    tool = engine()
    must_exist(tool)
    archived(tool, found, "ARCHIVE")


def archived(tool: str, command: list[str], placeholder: str) -> None:
    """Run a scanner on the image as a file, which every engine can write."""
    archive = ROOT / "dist" / "image.tar"
    archive.parent.mkdir(exist_ok=True)
    archive.unlink(missing_ok=True)
    try:
        save = ["buildah", "push", name(), f"docker-archive:{archive}:{name()}"]
        call(save if tool == "buildah" else [tool, "save", "--output", str(archive), name()])
        call([word.replace(placeholder, str(archive)) for word in command])
    finally:
        archive.unlink(missing_ok=True)
