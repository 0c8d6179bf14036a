"""The termination message: one line that the kubelet keeps when a container ends."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path


def write_message(text: str, environment: Mapping[str, str]) -> None:
    """Write the termination message, if this is a container of a pod."""
    named = environment.get("K8SCIFAR_TERMINATION_LOG")
    path = Path(named or "/dev/termination-log")
    with contextlib.suppress(OSError):
        if text and (named or path.exists()):
            path.write_text(f"{text[:1000]}\n")
