"""Whom did we wait for: each rank shows signs of life in the rendezvous store, and a survivor reads them there.

A collective that times out says only that it did. So a thread of each rank writes, once a second, a count that shows
that the process runs and another that shows how far it got; a frozen or cut-off rank's first count stands still, a
slow one's second lies behind.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from dataclasses import dataclass

from k8scifar.ranks import store as stores
from k8scifar.ranks.failures import told

EVERY = 1.0  # seconds between two signs of life
WATCH = 2.5  # seconds in which a living rank shows another
ANSWER = 3.0  # seconds that the store gets to answer
LINGER = 2.0  # seconds that the store's own node gives the other survivors to read in it
KEY = "k8scifar/pulse/"
VERDICT = "k8scifar/verdict"


@dataclass
class Sign:
    """What a rank last wrote: it runs (`beats` rises), how far it got, and where it is."""

    beats: int = 0
    progress: int = 0
    host: str = "?"
    address: str = "?"

    @classmethod
    def of(cls, text: str) -> Sign:
        """From the text that `Pulse` writes; an unreadable one is an empty sign."""
        with contextlib.suppress(ValueError):
            beats, progress, host, address = text.split()
            return cls(int(beats), int(progress), host, address)
        return cls()


class Pulse:
    """This rank's signs of life, and its judgement of the others; does nothing in a world of one."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.progress = 0
        self._stop = threading.Event()
        self._master = (os.environ.get("MASTER_ADDR", ""), int(os.environ.get("MASTER_PORT") or 0))
        if self._watched:
            threading.Thread(target=self._beat, name="pulse", daemon=True).start()

    @property
    def _watched(self) -> bool:
        return self.size > 1 and bool(self._master[0])

    def arrive(self) -> None:
        """This rank is about to wait for the others; all ranks call it equally often."""
        self.progress += 1

    def stop(self) -> None:
        """Show no more signs."""
        self._stop.set()

    def blame(self, error: BaseException) -> str:
        """What to say of a collective that failed: which rank it waited for, as far as can be told.

        After a time-out this watches for WATCH seconds; after a broken connection it answers at once.
        """
        what = told(error)
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
            time.sleep(LINGER)
        return f"{verdict} ({what})" if verdict else what

    def _verdict(self, store) -> str:
        if store.check([VERDICT]):
            return store.get(VERDICT).decode()
        before = self._signs(store)
        time.sleep(WATCH)
        if store.check([VERDICT]):
            return store.get(VERDICT).decode()
        after = self._signs(store)
        others = [rank for rank in range(self.size) if rank != self.rank]
        silent = [rank for rank in others if after[rank].beats == before[rank].beats]
        behind = [rank for rank in others if after[rank].progress < self.progress]
        if silent:
            verdict = f"no sign of life from {self._named(silent, after)}: frozen, or cut off"
        elif behind:
            verdict = f"{self._named(behind, after)} is alive but did not get as far in time: too slow, or stuck"
        else:
            return ""
        store.set(VERDICT, verdict)
        return verdict

    def _closed(self, store, what: str) -> str:
        """A peer's end closes its connections at once; its address may tell which it was."""
        if store.check([VERDICT]):
            return store.get(VERDICT).decode()
        signs = self._signs(store)
        there = [rank for rank, sign in signs.items() if rank != self.rank and f"[{sign.address}]" in what]
        return f"{self._named(there, signs)} ended or was cut off" if len(there) == 1 else ""

    @staticmethod
    def _named(ranks: list[int], signs: dict[int, Sign]) -> str:
        names = [f"rank {rank} ({signs[rank].host})" for rank in ranks]
        return ", ".join(names)

    def _signs(self, store) -> dict[int, Sign]:
        found = {}
        for rank in range(self.size):
            key = f"{KEY}{rank}"
            found[rank] = Sign.of(store.get(key).decode()) if store.check([key]) else Sign()
        return found

    def _beat(self) -> None:
        store, beats, place = None, 0, f"{socket.gethostname()} {self._address()}"
        while not self._stop.wait(EVERY if beats else 0.0):
            beats += 1
            try:
                store = store or self._connect()
                store.set(f"{KEY}{self.rank}", f"{beats} {self.progress} {place}")
            except (RuntimeError, OSError):
                store = None  # node 0 is gone or out of reach; its ranks' failure will end this one

    def _connect(self):
        return stores.connect(*self._master, reach=ANSWER, answer=ANSWER)

    def _address(self) -> str:
        """The address of this machine that node 0 sees."""
        with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect(self._master)
            return probe.getsockname()[0]
        return "?"
