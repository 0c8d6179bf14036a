"""How a node that is done detects another node that is not, where the nodes share no folder.

A node that lost its disk can learn only from another node's ranks that the run is finished, and receive its results. A
node that is done runs no ranks. So node 0 listens at the rendezvous port, where the others' agents look for its store.
The others look there now and then for node 0's store, which is open while node 0 is not done.
"""

from __future__ import annotations

import contextlib
import select
import socket
import time

from k8scifar.launch.node import NodeSpec

DONE = b"k8scifar: done\n"  # node 0 sends it to each client; a store sends nothing before its client does
ANSWER_TIMEOUT = 2.0  # seconds in which the other side sends something, if it is going to
REST = 30.0  # seconds between two attempts for unfinished nodes


class UnfinishedNodes:
    """Detects nodes that wait for this one, which is done. A context manager."""

    def __init__(self, spec: NodeSpec) -> None:
        self._spec = spec
        self._listener: socket.socket | None = None
        self._next = 0.0

    def __enter__(self) -> UnfinishedNodes:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def one_waits(self) -> bool:
        """Return whether another node seems to wait for this one; if so, the port is free again."""
        if time.monotonic() < self._next:
            return False
        waits = self._agent_connects() if self._spec.node_rank == 0 else self._store_is_open()
        if waits:
            self.close()
            self._next = time.monotonic() + REST
        return waits

    def close(self) -> None:
        """Stop listening at the port."""
        if self._listener:
            self._listener.close()
            self._listener = None

    def _agent_connects(self) -> bool:
        """Node 0: whether a client connects and sends something, as an agent does that looks for the store."""
        with contextlib.suppress(OSError):
            if self._listener is None:
                both = socket.has_dualstack_ipv6()
                family = socket.AF_INET6 if both else socket.AF_INET
                self._listener = socket.create_server(
                    ("", self._spec.master_port or 0), family=family, dualstack_ipv6=both
                )
            while select.select([self._listener], [], [], 0)[0]:
                with self._listener.accept()[0] as client:
                    client.settimeout(ANSWER_TIMEOUT)
                    client.sendall(DONE)
                    if client.recv(1):
                        return True
        return False

    def _store_is_open(self) -> bool:
        """Another node: whether node 0 has its store open; a node 0 that is done sends `DONE`."""
        with contextlib.suppress(OSError):
            place = (self._spec.master_addr, self._spec.master_port or 0)
            with socket.create_connection(place, timeout=ANSWER_TIMEOUT) as store:
                store.settimeout(ANSWER_TIMEOUT)
                try:
                    store.recv(len(DONE))
                except TimeoutError:
                    return True
        return False
