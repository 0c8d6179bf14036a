"""Heartbeats in the rendezvous store, to identify the rank that a timed-out collective waited for.

torch reports a time-out without the rank that caused it. So a thread of each rank writes two counts to the store once a
second: `beats` shows that the process runs, `progress` how many collectives it has reached. The `beats` of a frozen or
cut-off rank stand still; the `progress` of a slow rank is behind.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from dataclasses import dataclass

from k8scifar.ranks import store as stores
from k8scifar.ranks.failures import brief

INTERVAL = 1.0  # seconds between two heartbeats
WATCH = 2.5  # seconds in which a running rank writes at least one more
STORE_TIMEOUT = 3.0  # seconds
READING_TIME = 2.0  # seconds for which node 0 keeps the store open, so that the other survivors can read the verdict
KEY = "k8scifar/heartbeat/"
VERDICT = "k8scifar/verdict"


@dataclass
class Heartbeat:
    """What a rank last wrote."""

    beats: int = 0
    progress: int = 0
    host: str = "?"
    address: str = "?"

    @classmethod
    def of(cls, text: str) -> Heartbeat:
        """Parse the text that `Heartbeats` writes; unreadable text gives the defaults."""
        with contextlib.suppress(ValueError):
            beats, progress, host, address = text.split()
            return cls(int(beats), int(progress), host, address)
        return cls()


class Heartbeats:
    """Write this rank's heartbeats and judge those of the others; a single rank does neither."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.progress = 0
        self._stop = threading.Event()
        self._master = (os.environ.get("MASTER_ADDR", ""), int(os.environ.get("MASTER_PORT") or 0))
        if self._watched:
            threading.Thread(target=self._beat, name="heartbeats", daemon=True).start()

    @property
    def _watched(self) -> bool:
        return self.size > 1 and bool(self._master[0])

    def arrive(self) -> None:
        """Count one more collective; called before this rank waits for the others, equally often on all ranks."""
        self.progress += 1

    def stop(self) -> None:
        """Write no more heartbeats."""
        self._stop.set()

    def blame(self, error: BaseException) -> str:
        """Describe a failed collective, with the rank that it waited for, if that can be found out.

        After a time-out this watches the heartbeats for WATCH seconds; after a broken connection it returns at once.
        """
        what = brief(error)
        timed_out = "timed out" in what.lower() or "timeout" in what.lower()
        if not self._watched:
            return what
        try:
            store = self._connect()
            verdict = self._verdict(store) if timed_out else self._closed(store, what)
        except (RuntimeError, OSError):
            verdict = ""
            if os.environ.get("GROUP_RANK", "0") != "0":
                verdict = f"rank 0 is gone or out of reach: its node, {self._master[0]}, does not answer"
        if timed_out and os.environ.get("GROUP_RANK", "0") == "0":
            time.sleep(READING_TIME)
        return f"{verdict} ({what})" if verdict else what

    def _verdict(self, store) -> str:
        if store.check([VERDICT]):
            return store.get(VERDICT).decode()
        before = self._read(store)
        time.sleep(WATCH)
        if store.check([VERDICT]):
            return store.get(VERDICT).decode()
        after = self._read(store)
        others = [rank for rank in range(self.size) if rank != self.rank]
        silent = [rank for rank in others if after[rank].beats == before[rank].beats]
        behind = [rank for rank in others if after[rank].progress < self.progress]
        if silent:
            verdict = f"no sign of life from {_listed(silent, after)}: frozen, or cut off"
        elif behind:
            verdict = f"{_listed(behind, after)} is alive but did not get as far in time: too slow, or stuck"
        else:
            return ""
        store.set(VERDICT, verdict)
        return verdict

    def _closed(self, store, what: str) -> str:
        """Identify the peer whose connection broke by the address in the error; "" if it is not there."""
        if store.check([VERDICT]):
            return store.get(VERDICT).decode()
        found = self._read(store)
        there = [rank for rank, beat in found.items() if rank != self.rank and f"[{beat.address}]" in what]
        return f"{_listed(there, found)} ended or was cut off" if len(there) == 1 else ""

    def _read(self, store) -> dict[int, Heartbeat]:
        found = {}
        for rank in range(self.size):
            key = f"{KEY}{rank}"
            found[rank] = Heartbeat.of(store.get(key).decode()) if store.check([key]) else Heartbeat()
        return found

    def _beat(self) -> None:
        store, beats, place = None, 0, f"{socket.gethostname()} {self._address()}"
        while not self._stop.wait(INTERVAL if beats else 0.0):
            beats += 1
            try:
                store = store or self._connect()
                store.set(f"{KEY}{self.rank}", f"{beats} {self.progress} {place}")
            except (RuntimeError, OSError):
                store = None  # node 0 is gone or out of reach; its ranks' failure will end this rank

    def _connect(self):
        return stores.connect(*self._master, reach=STORE_TIMEOUT, answer=STORE_TIMEOUT)

    def _address(self) -> str:
        """The address of this machine that node 0 sees."""
        with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect(self._master)
            return probe.getsockname()[0]
        return "?"


def _listed(ranks: list[int], found: dict[int, Heartbeat]) -> str:
    return ", ".join(f"rank {rank} ({found[rank].host})" for rank in ranks)
