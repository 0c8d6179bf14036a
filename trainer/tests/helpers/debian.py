"""Debian's packages, for tests that may install what they need."""

import fcntl
import os
import shutil
import subprocess

LOCK = "/tmp/k8scifar-apt.lock"  # also taken by with-engine.sh and base.sh: apt itself does not wait


def may_install() -> bool:
    """Whether K8SCIFAR_INSTALL=1, root and apt-get allow it."""
    return os.environ.get("K8SCIFAR_INSTALL") == "1" and os.geteuid() == 0 and bool(shutil.which("apt-get"))


def install(*packages: str) -> None:
    """Install these packages; one process at a time."""
    quiet = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    with open(LOCK, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in (["update"], ["install", "-y", "--no-install-recommends", *packages]):
            subprocess.run(["apt-get", "-qq", *command], check=True, env=quiet, stdout=subprocess.DEVNULL)
