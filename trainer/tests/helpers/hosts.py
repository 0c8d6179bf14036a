"""Hosts on one machine: network namespaces on a bridge, each with its own host name and names of the others."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import janitor
import pytest
from janitor import command_line

_groups = itertools.count()  # several groups of hosts at once have different names


def require() -> None:
    """Skip the test where network namespaces can't be made."""
    if os.geteuid() != 0 or not shutil.which("ip") or not shutil.which("unshare"):
        pytest.skip("network namespaces need root, ip and unshare")
    name = f"k8scifar-{os.getpid()}-probe"
    if subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False).returncode:
        pytest.skip("network namespaces can't be made here")
    subprocess.run(["ip", "netns", "delete", name], check=True)


@contextlib.contextmanager
def several(names: Sequence[str]) -> Iterator[list[Host]]:
    """Hosts on one bridge that see each other under these names; all their processes are killed at the end."""
    require()
    janitor.start()
    prefix = f"k8scifar-{os.getpid()}-{next(_groups)}"
    switch = f"{prefix}-switch"
    hosts = [Host(f"{prefix}-{number}", name, f"10.77.0.{number + 1}") for number, name in enumerate(names)]
    spaces = [switch, *(host.space for host in hosts)]
    try:
        for space in spaces:
            _ip("netns", "add", space)
        _ip("-n", switch, "link", "add", "bridge", "type", "bridge")
        _ip("-n", switch, "link", "set", "bridge", "up")
        for number, host in enumerate(hosts):
            port = f"port{number}"
            _ip("link", "add", "eth0", "netns", host.space, "type", "veth", "peer", "name", port, "netns", switch)
            _ip("-n", switch, "link", "set", port, "master", "bridge", "up")
            _ip("-n", host.space, "addr", "add", f"{host.address}/24", "dev", "eth0")
            _ip("-n", host.space, "link", "set", "eth0", "up")
            _ip("-n", host.space, "link", "set", "lo", "up")
            (Path("/etc/netns") / host.space).mkdir(parents=True)
            host.know(hosts)
        yield hosts
    finally:
        for host in hosts:
            host.kill()
        for space in spaces:
            subprocess.run(["ip", "netns", "delete", space], capture_output=True, check=False)
            shutil.rmtree(Path("/etc/netns") / space, ignore_errors=True)


class Host:
    """One network namespace."""

    def __init__(self, space: str, name: str, address: str) -> None:
        self.space, self.name, self.address = space, name, address

    def know(self, hosts: Sequence[Host]) -> None:
        """From now on the names of these hosts resolve here, and no others (`ip netns exec` lays the file over)."""
        table = [f"{host.address} {host.name} {host.name.partition('.')[0]}" for host in hosts]
        path = Path("/etc/netns") / self.space / "hosts"
        path.write_text("\n".join(["127.0.0.1 localhost", *table]) + "\n")

    def popen(self, command: Sequence[str], environment: Mapping[str, str], log: Path) -> subprocess.Popen:
        """Start a process here, with this host's name; its output is added to `log`."""
        short = self.name.partition(".")[0]
        whole = ["ip", "netns", "exec", self.space, "unshare", "--uts", "sh", "-c"]
        whole += [f'hostname {short} && exec "$@"', "pod", *command]
        marked = {janitor.MARK: os.environ[janitor.MARK]}
        with open(log, "ab") as output:
            return subprocess.Popen(whole, env=dict(environment) | marked, stdout=output, stderr=output)

    def processes(self, word: str = "") -> list[int]:
        """Ids of the processes here whose command line holds `word`, oldest first."""
        done = subprocess.run(["ip", "netns", "pids", self.space], capture_output=True, text=True, check=False)
        return [int(line) for line in done.stdout.split() if word in command_line(int(line))]

    def signal(self, number: int, word: str = "") -> list[int]:
        """Send a signal to these processes; returns which got it."""
        found = self.processes(word)
        send(found, number)
        return found

    def kill(self) -> None:
        """SIGKILL every process here, as a machine that loses power."""
        while self.signal(signal.SIGKILL):
            time.sleep(0.05)

    def link(self, up: bool) -> None:
        """Plug the network cable in or out."""
        _ip("-n", self.space, "link", "set", "eth0", "up" if up else "down")

    def limit(self, rate: str) -> None:
        """Limit what this host sends, e.g. `100mbit`; empty: no limit.

        The burst is longer than the largest packet that the kernel hands down (64 KB): a shorter one makes it cut all
        packets in software, which costs the processor what a network card does by itself.
        """
        tc = ["tc", "-n", self.space, "qdisc"]
        subprocess.run([*tc, "del", "dev", "eth0", "root"], capture_output=True, check=False)
        if rate:
            shape = ["tbf", "rate", rate, "burst", "256kb", "latency", "50ms"]
            subprocess.run([*tc, "add", "dev", "eth0", "root", *shape], check=True)

    def reset_connections(self) -> None:
        """Have the kernel abort all TCP connections with the other hosts."""
        command = ["ip", "netns", "exec", self.space, "ss", "-K", "dst", "10.77.0.0/24"]
        subprocess.run(command, check=True, capture_output=True)


def send(pids: Sequence[int], number: int) -> None:
    """Send a signal to those of these processes that still are."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
