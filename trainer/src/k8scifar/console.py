"""Log lines."""

from __future__ import annotations

import sys


def say(text: str) -> None:
    """Print a line on stderr and flush it."""
    print(text, file=sys.stderr, flush=True)
