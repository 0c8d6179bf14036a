"""Hosts on one machine: network namespaces on a veth pair, each with its own host name and names of the others."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest


def require() -> None:
    """Skip the test where network namespaces can't be made."""
    if os.geteuid() != 0 or not shutil.which("ip") or not shutil.which("unshare"):
        pytest.skip("network namespaces need root, ip and unshare")
    name = f"k8scifar-{os.getpid()}-probe"
    if subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False).returncode:
        pytest.skip("network namespaces can't be made here")
    subprocess.run(["ip", "netns", "delete", name], check=True)


@contextlib.contextmanager
def two(names: Sequence[str]) -> Iterator[list[Host]]:
    """Two hosts that see each other under these names; all their processes are killed at the end."""
    require()
    spaces = [f"k8scifar-{os.getpid()}-{number}" for number in range(2)]
    hosts = [Host(space, name) for space, name in zip(spaces, names, strict=True)]
    try:
        for space in spaces:
            _ip("netns", "add", space)
        _ip("link", "add", "eth0", "netns", spaces[0], "type", "veth", "peer", "name", "eth0", "netns", spaces[1])
        table = ["127.0.0.1 localhost"]
        for number, (space, name) in enumerate(zip(spaces, names, strict=True)):
            address = f"10.77.0.{number + 1}"
            _ip("-n", space, "addr", "add", f"{address}/24", "dev", "eth0")
            _ip("-n", space, "link", "set", "eth0", "up")
            _ip("-n", space, "link", "set", "lo", "up")
            table.append(f"{address} {name} {name.partition('.')[0]}")
        for space in spaces:  # `ip netns exec` lays these over /etc/hosts
            folder = Path("/etc/netns") / space
            folder.mkdir(parents=True)
            (folder / "hosts").write_text("\n".join(table) + "\n")
        yield hosts
    finally:
        for host in hosts:
            host.kill()
        for space in spaces:
            subprocess.run(["ip", "netns", "delete", space], capture_output=True, check=False)
            shutil.rmtree(Path("/etc/netns") / space, ignore_errors=True)


class Host:
    """One network namespace."""

    def __init__(self, space: str, name: str) -> None:
        self.space, self.name = space, name

    def popen(self, command: Sequence[str], environment: Mapping[str, str], log: Path) -> subprocess.Popen:
        """Start a process here, with this host's name; its output is added to `log`."""
        short = self.name.partition(".")[0]
        whole = ["ip", "netns", "exec", self.space, "unshare", "--uts", "sh", "-c"]
        whole += [f'hostname {short} && exec "$@"', "pod", *command]
        with open(log, "ab") as output:
            return subprocess.Popen(whole, env=dict(environment), stdout=output, stderr=output)

    def processes(self) -> list[int]:
        """Ids of the processes here."""
        done = subprocess.run(["ip", "netns", "pids", self.space], capture_output=True, text=True, check=False)
        return [int(line) for line in done.stdout.split()]

    def kill(self) -> None:
        """SIGKILL every process here, as a machine that loses power."""
        while found := self.processes():
            for pid in found:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)

    def limit(self, rate: str) -> None:
        """Limit what this host sends, e.g. `100mbit`; empty: no limit."""
        tc = ["tc", "-n", self.space, "qdisc"]
        subprocess.run([*tc, "del", "dev", "eth0", "root"], capture_output=True, check=False)
        if rate:
            shape = ["tbf", "rate", rate, "burst", "64kb", "latency", "50ms"]
            subprocess.run([*tc, "add", "dev", "eth0", "root", *shape], check=True)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
