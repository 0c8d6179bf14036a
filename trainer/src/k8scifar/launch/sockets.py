"""Look up host names and ports of this machine; no call blocks for long."""

from __future__ import annotations

import contextlib
import re
import socket
import threading
from pathlib import Path


def resolve(name: str, seconds: float = 10.0) -> frozenset[str]:
    """Return the addresses of a host name, none where it does not resolve; in a thread, to limit the time."""
    found: list[str] = []

    def ask() -> None:
        with contextlib.suppress(OSError, UnicodeError):
            found.extend(str(info[4][0]) for info in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return frozenset(found)


def leads_nowhere(name: str) -> bool:
    """Return whether a host name resolves to loopback addresses only, which no other machine can reach."""
    here = resolve(name)
    return bool(here) and all(address.startswith("127.") or address == "::1" for address in here)


def port_is_free(port: int) -> bool:
    """Return whether a server can listen on this TCP port of this machine."""
    family, everywhere = (socket.AF_INET6, "::") if socket.has_dualstack_ipv6() else (socket.AF_INET, "")
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        try:
            probe.bind((everywhere, port))
            probe.listen()
        except OSError:
            return False
    return True


def free_port() -> int:
    """Return a free TCP port of the loopback interface."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def name_advice(name: str, resolver: Path = Path("/etc/resolv.conf")) -> str:
    """Return advice on a name that does not resolve."""
    with contextlib.suppress(OSError):
        domains = re.findall(r"\bsvc\.(\S+)", resolver.read_text())
        if domains and ".svc." in name and not name.endswith(f".svc.{domains[0]}"):
            return f"this cluster's domain is {domains[0]}: set clusterDomain={domains[0]}"
    return "is node 0's pod scheduled, does the headless Service exist, and does cluster DNS answer?"
