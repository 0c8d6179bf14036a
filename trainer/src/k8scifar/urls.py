"""Addresses and paths as people write them, and what of an address may be shown."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit, urlunsplit

SECRET = re.compile(r"sig|token|key|secret|pass|cred|auth|expire|policy|^x-(amz|goog)-|^s[a-z]$|^se$", re.I)


def is_address(text: str) -> bool:
    """Whether `text` is an address rather than a path."""
    return re.match(r"[a-z][a-z0-9+.-]*://", text) is not None


def local(text: str | Path) -> Path:
    """A path as a person writes it, ~ being the home folder also where no shell has seen it."""
    return Path(os.path.expanduser(text))


def public(address: str) -> str:
    """`address` without user, password, signatures and tokens, as logs and the manifest may show it.

    What else its query holds is kept as a short digest: it may be what tells two archives apart.
    """
    parts = urlsplit(address)
    rest = [pair for pair in parse_qsl(parts.query, keep_blank_values=True) if not SECRET.search(pair[0])]
    query = hashlib.sha256(repr(rest).encode()).hexdigest()[:8] if rest else ""
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, query, ""))
