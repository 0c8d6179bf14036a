"""A client of the store at which the nodes meet: node 0's, of torch's rendezvous."""

from __future__ import annotations

import datetime
import os
import socket

PATIENCE = 30.0  # seconds beyond the process-group time-out, so that the ranks, which can name a silent one, are first


def connect(address: str, port: int, reach: float = 2.0, answer: float | None = None):
    """A client of node 0's store, which does not count as one of the nodes. Raises OSError or RuntimeError.

    Args:
        reach: seconds for the connection.
        answer: seconds for each answer; None: PATIENCE beyond the process-group time-out.
    """
    from torch.distributed import TCPStore

    if answer is None:
        answer = float(os.environ.get("K8SCIFAR_PEER_TIMEOUT", "60")) + PATIENCE
    socket.create_connection((address, port), timeout=reach).close()  # torch's own retries are seconds apart
    return TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=datetime.timedelta(seconds=answer))
