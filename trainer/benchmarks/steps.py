"""One rank of the trainer, its loop untouched, watched for some steps: steps.py OUT STEPS [train's options].

Rank 0 writes OUT: wall-clock times of its stages and steps, of each checkpoint's stall, and, with BENCH_EVALUATE=n and
BENCH_MINUTES=m, the test accuracy after each n steps and the last (the time for it left out) until m minutes are spent.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import sys
import time
import types
from pathlib import Path

ENTERED = time.time()

import torch  # noqa: E402

IMPORTED_TORCH = time.time()

from k8scifar import cli  # noqa: E402
from k8scifar.ranks import agree  # noqa: E402
from k8scifar.training import epochs, loop, model, opening, saving  # noqa: E402
from k8scifar.training.session import Session  # noqa: E402

IMPORTED = time.time()


SETTLED = 100  # steps of a GPU left out of its rate: compiling, choosing algorithms


class Enough(Exception):
    """As many steps as were asked for are done."""


class Watch:
    """Listens to the trainer."""

    def __init__(self, steps: int) -> None:
        self.steps, self.every = steps, int(os.environ.get("BENCH_EVALUATE", "0"))
        self.budget = 60 * float(os.environ.get("BENCH_MINUTES", "inf"))
        self.ended: list[float] = []  # of each step
        self.sent: list[int] = []  # bytes by the end of each step
        self.left_out = 0.0  # seconds of evaluations
        self.curve: list[tuple[float, float, int]] = []  # seconds of training, test accuracy, steps done
        self.stalls: list[float] = []
        self.saved_after: list[int] = []
        self.joined = self.opened = self.began = 0.0
        self.session: Session | None = None
        self.split: dict[str, float] = {}

    def step(self) -> None:
        """After each optimiser step."""
        # A GPU's steps are queued: the two between which the rate is taken are waited for.
        if self.session.world.device.type == "cuda" and len(self.ended) in (SETTLED, self.steps - 1):
            torch.cuda.synchronize()
        self.ended.append(time.time())
        self.sent.append(bytes_sent())
        if self.every and (len(self.ended) % self.every == 0 or len(self.ended) == self.steps):
            self._evaluate()
        over = torch.tensor([int(time.time() - self.began - self.left_out > self.budget)])
        if self.budget < float("inf"):
            torch.distributed.broadcast(over, 0, group=self.session.world.host_group)
        if len(self.ended) == self.steps or over.item():
            self.split = self.session.clock.read()
            raise Enough

    def _evaluate(self) -> None:
        spent = time.time() - self.began - self.left_out
        session = self.session
        statistics = session.state.statistics.running()
        kept = [tensor.clone() for tensor in statistics]
        agree.average(statistics, session.world, weight=session.state.shares.weight(session.world.rank))
        outcome = epochs.evaluate(session, session.plan.pixels(session.state.step - 1), False, lambda: True)
        for tensor, value in zip(statistics, kept, strict=True):
            tensor.copy_(value)
        self.curve.append((spent, outcome.figures["accuracy"], session.state.step))
        self.left_out = time.time() - self.began - spent


def bytes_sent() -> int:
    """Bytes that this host's network interfaces have sent by now, the loopback left out."""
    counters = Path("/sys/class/net").glob("*/statistics/tx_bytes")
    return sum(int(path.read_text()) for path in counters if path.parts[-3] != "lo")


def main(out: Path, steps: int, arguments: list[str]) -> None:
    """Train and write what was seen."""
    watch = Watch(steps)
    meet, save, train, open_session = agree.meet, saving.save, loop.train, opening.open_session

    def met(world, facts):
        watch.joined = watch.joined or time.time()
        meet(world, facts)

    def saved(session, must=False):
        begun = time.time()
        save(session, must)
        watch.stalls.append(time.time() - begun)
        watch.saved_after.append(len(watch.ended))

    def looping(session, stop):
        watch.session, watch.began = session, time.time()
        train(session, stop)

    def opened(*parts):
        session = open_session(*parts)
        watch.opened = time.time()
        return session

    agree.meet, saving.save, opening.open_session, loop.train = met, saved, opened, looping
    loop.liveness = types.SimpleNamespace(touch=watch.step)  # the loop touches it after each step
    loop._keep_going = lambda *_: True
    with contextlib.suppress(Enough):
        cli.main(["train", *arguments])
    session = watch.session
    if not session.world.is_main:
        return
    started = float(os.environ.get("BENCH_STARTED", ENTERED))
    gpu = session.world.device.type == "cuda"
    pixels = session.plan.pixels(0)
    found = {
        "mode": session.state.exchange.name,
        "batch": session.config.global_batch,
        "flops": model.training_flops(session.state.net, pixels),  # an image, at the first step's resolution
        "precision": session.precision,
        "stages": {
            "launcher": ENTERED - started,
            "import torch": IMPORTED_TORCH - ENTERED,
            "import the rest": IMPORTED - IMPORTED_TORCH,
            "join": watch.joined - IMPORTED,
            "data, network, checks": watch.opened - watch.joined,
            "first step": watch.ended[0] - watch.opened,
        },
        "first_step": watch.ended[0] - started,
        "steps": [end - start for start, end in itertools.pairwise(watch.ended)],
        "sent": round((watch.sent[-1] - watch.sent[0]) / 1e6 / max(1, len(watch.sent) - 1), 2),  # MB a step
        "stalls": watch.stalls,
        "saved_after": watch.saved_after,
        "curve": watch.curve,
        "seconds": watch.ended[-1] - watch.began - watch.left_out,
        "split": watch.split,
        "peak_memory": torch.cuda.max_memory_allocated() if gpu else None,
    }
    out.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
