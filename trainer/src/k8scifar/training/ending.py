"""The last act of a run: the weights and the summary, on each node that keeps a run folder."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

import torch

from k8scifar.errors import TrainingError
from k8scifar.ranks import agree
from k8scifar.results import report
from k8scifar.results.outcome import mistakes
from k8scifar.results.speedup import sentence
from k8scifar.results.summary import describe
from k8scifar.training.summary import summarise

if TYPE_CHECKING:
    from k8scifar.training.session import Session

AGAIN = 5.0  # seconds between two tries


def end(session: Session) -> dict[str, Any]:
    """Write what the run came to, wherever it is kept; collective. Returns the summary.

    A full disk gets some time, unless another node could write it all. Raises TrainingError where none can.
    """
    world = session.world
    last = time.monotonic() + 0.8 * agree.LONGEST * world.timeout
    while True:
        # Nobody leaves before the mark of the finished run is there.
        kept = agree.each(world, (lambda: _write(session)) if world.keeps else None)
        done = [facts for facts in kept if facts and not facts["problem"]]
        problem = (kept[world.rank] or {}).get("problem")
        if done:
            break
        if agree.gather(torch.tensor([time.monotonic() > last]), world)[0]:
            raise TrainingError(kept[0]["problem"])
        if problem:
            session.tell(f"{problem}; trying again")
        time.sleep(AGAIN)
    if problem:
        session.tell(f"{problem}; another node has it all")
    session.tell_drift([facts["written"] if facts else (0, 0) for facts in kept])
    summary = done[0]["summary"]
    session.display.text("summary", json.dumps(summary, indent=1))
    if speed := summary.get("machines"):
        session.display.write(sentence(speed))
    session.display.write(describe(summary, session.folder.path))
    return summary


def _write(session: Session) -> dict[str, Any]:
    """One node's part: what it has written, or why it could not."""
    facts: dict[str, Any] = {"problem": "", "written": session.close_writer()}
    config, manifest, outcome, split = session.config, session.manifest, session.outcome, session.evaluated
    about = {
        "model": config.model.model_dump(mode="json"),
        "classes": manifest.classes,
        "mean": manifest.mean,
        "std": manifest.std,
        "pixels": session.plan.last_pixels,
    }
    try:
        weights = session.folder.export(session.state.net.state_dict(), about)
        summary = summarise(session.state, session.plan, outcome, session.precision, weights)
        summary["mistakes"] = mistakes(outcome, split)
        report.attempt(session.folder.path, summary, split, session.tell, session.world.timeout)
        session.folder.write_summary(summary)
    except TrainingError as error:
        return facts | {"problem": str(error)}
    return facts | {"summary": summary}
