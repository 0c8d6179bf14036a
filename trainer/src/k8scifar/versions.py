"""What decides a result beside the configuration: versions, and a digest of this package's own code."""

from __future__ import annotations

import functools
import hashlib
import platform
from pathlib import Path

import torch

import k8scifar


@functools.cache
def code() -> str:
    """sha256 (first 16 hex digits) of the package's source files: equal versions may still be different code."""
    digest = hashlib.sha256()
    folder = Path(__file__).parent
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"{path.relative_to(folder).as_posix()}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def versions() -> dict[str, str]:
    """Name -> version of all that computes."""
    found = {"k8scifar": k8scifar.__version__, "code": code(), "torch": torch.__version__}
    return found | {"python": platform.python_version(), "machine": platform.machine(), "system": platform.system()}
