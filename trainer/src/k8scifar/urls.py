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
    return re.match(r"[a-z][a-z0-9+.-]*://", text, re.IGNORECASE) is not None


def local(text: str | Path) -> Path:
    """A path as a person writes it, ~ being the home folder also where no shell has seen it."""
    return Path(os.path.expanduser(text))


def public(address: str) -> str:
    """`address` without user, password, signatures and tokens, as logs and the manifest may show it.

    What else its query holds is kept as a short digest: it may be what tells two archives apart.
    """
    try:
        parts = urlsplit(_without_user(address))
    except ValueError:  # brackets that hold no IPv6 address
        return f"{address.partition('://')[0]}://..."
    rest = [pair for pair in parse_qsl(parts.query, keep_blank_values=True) if not SECRET.search(pair[0])]
    query = hashlib.sha256(repr(rest).encode()).hexdigest()[:8] if rest else ""
    return urlunsplit((parts.scheme, parts.netloc, parts.path, query, ""))


def _without_user(address: str) -> str:
    """`address` without user and password, also where a password holds / ? or # as they are.

    After a colon that begins no port all up to the last @ is taken for the password: rather too much than too little.
    """
    scheme, _, rest = address.partition("://")
    host = re.split("[/?#]", rest, maxsplit=1)[0]
    where = host  # what may hold them
    if ":" in host.partition("@")[0]:
        where = rest.partition("?")[0] if "@" in host or re.search(r":\d*$", host) else rest
    _, at, after = where.rpartition("@")
    return f"{scheme}://{after}{rest[len(where) :]}" if at else address
