"""Parse addresses and paths, and hide the secrets of an address."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit, urlunsplit

SECRET = re.compile(r"sig|token|key|secret|pass|cred|auth|expire|policy|^x-(amz|goog)-|^s[a-z]$|^se$", re.I)


def is_address(text: str) -> bool:
    """Return whether `text` is an address and not a path."""
    return re.match(r"[a-z][a-z0-9+.-]*://", text, re.IGNORECASE) is not None


def local(text: str | Path) -> Path:
    """Return a path in which a leading ~ is the home folder, also where no shell has expanded it."""
    return Path(os.path.expanduser(text))


def public(address: str) -> str:
    """Return `address` without user, password, signatures and tokens, for logs and the manifest.

    The rest of its query becomes a short digest, because two archives may differ in it alone.
    """
    try:
        parts = urlsplit(_without_user(address))
    except ValueError:  # brackets without an IPv6 address in them
        return f"{address.partition('://')[0]}://..."
    rest = [pair for pair in parse_qsl(parts.query, keep_blank_values=True) if not SECRET.search(pair[0])]
    query = hashlib.sha256(repr(rest).encode()).hexdigest()[:8] if rest else ""
    return urlunsplit((parts.scheme, parts.netloc, parts.path, query, ""))


def _without_user(address: str) -> str:
    """Return `address` without user and password, also where a password holds an unescaped /, ? or #.

    After a colon that begins no port, all up to the last @ counts as the password. That may hide too much, never too
    little.
    """
    scheme, _, rest = address.partition("://")
    host = re.split("[/?#]", rest, maxsplit=1)[0]
    where = host  # the part that may hold user and password
    if ":" in host.partition("@")[0]:
        where = rest.partition("?")[0] if "@" in host or re.search(r":\d*$", host) else rest
    _, at, after = where.rpartition("@")
    return f"{scheme}://{after}{rest[len(where) :]}" if at else address
