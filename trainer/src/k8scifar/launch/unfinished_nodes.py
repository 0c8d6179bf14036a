"""How a node that is done notices one that is not, where each has folders of its own.

A node that lost its disk can learn only from the ranks of another that the run is finished, and take what it left. A
done node has none running. So node 0 listens at the port of the rendezvous, where the others' agents ask for its store;
and the others look there now and then whether node 0 has a store open, which it has while it is not done.
"""

from __future__ import annotations

import contextlib
import select
import socket
import time

from k8scifar.launch.node import NodeSpec

DONE = b"k8scifar: done\n"  # what node 0 says to whoever connects; a store waits to be spoken to
PATIENCE = 2.0  # seconds in which the other side says something, if it is going to
REST = 30.0  # seconds between two attempts, whoever knocks


class Door:
    """Opened by a node that is done; `somebody_waits` is asked again and again. A context manager."""

    def __init__(self, spec: NodeSpec) -> None:
        self._spec = spec
        self._listener: socket.socket | None = None
        self._next = 0.0

    def __enter__(self) -> Door:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def somebody_waits(self) -> bool:
        """Whether another node is waiting for this one, as far as can be told. The port is free again then."""
        if time.monotonic() < self._next:
            return False
        waits = self._is_asked() if self._spec.node_rank == 0 else self._finds_a_store()
        if waits:
            self.close()
            self._next = time.monotonic() + REST
        return waits

    def close(self) -> None:
        """Leave the port."""
        if self._listener:
            self._listener.close()
            self._listener = None

    def _is_asked(self) -> bool:
        """Node 0: whether somebody connects and speaks, as an agent does that looks for the store."""
        with contextlib.suppress(OSError):
            if self._listener is None:
                both = socket.has_dualstack_ipv6()
                family = socket.AF_INET6 if both else socket.AF_INET
                self._listener = socket.create_server(
                    ("", self._spec.master_port or 0), family=family, dualstack_ipv6=both
                )
            while select.select([self._listener], [], [], 0)[0]:
                with self._listener.accept()[0] as caller:
                    caller.settimeout(PATIENCE)
                    caller.sendall(DONE)
                    if caller.recv(1):
                        return True
        return False

    def _finds_a_store(self) -> bool:
        """Another node: whether node 0 has its store open, rather than a door."""
        with contextlib.suppress(OSError):
            place = (self._spec.master_addr, self._spec.master_port or 0)
            with socket.create_connection(place, timeout=PATIENCE) as store:
                store.settimeout(PATIENCE)
                try:
                    store.recv(len(DONE))
                except TimeoutError:
                    return True
        return False
