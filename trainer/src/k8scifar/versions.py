"""Versions of what computes a result, and a digest of this package's code."""

from __future__ import annotations

import functools
import hashlib
import platform
from pathlib import Path

import torch

import k8scifar


@functools.cache
def code() -> str:
    """Return the first 16 hex digits of the source files' sha256: equal versions may differ in code."""
    digest = hashlib.sha256()
    folder = Path(__file__).parent
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"{path.relative_to(folder).as_posix()}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def versions() -> dict[str, str]:
    """Return the version of each thing that affects a result."""
    found = {"k8scifar": k8scifar.__version__, "code": code(), "torch": torch.__version__}
    return found | {"python": platform.python_version(), "machine": platform.machine(), "system": platform.system()}
