"""The last act of a run: export the weights and write the summary, on each node that keeps a run folder."""

from __future__ import annotations

import json
import time
from typing import Any

import torch

from k8scifar.errors import TrainingError
from k8scifar.ranks import agree
from k8scifar.results import report
from k8scifar.results.outcome import mistakes
from k8scifar.results.speedup import sentence
from k8scifar.results.summary import describe
from k8scifar.training import epochs, saving
from k8scifar.training.session import Session
from k8scifar.training.summary import summarise

RETRY = 5.0  # seconds between two tries


def complete(session: Session) -> None:
    """Write weights, report and summary on every node that keeps a run folder, and log the result; collective.

    While no node could write everything, all try again for a while. Raises TrainingError where none can.
    """
    if session.outcome is None:  # this process resumed after the last evaluation
        session.outcome = epochs.evaluate(session, session.plan.last_pixels, is_last=True, keep_going=lambda: True)
    world = session.world
    last = time.monotonic() + 0.8 * agree.PATIENCE * world.timeout
    while True:
        # Every rank waits here until a summary, which marks the run as finished, is on a disk.
        kept = agree.each(world, (lambda: _write(session)) if world.keeps else None)
        done = [facts for facts in kept if facts and not facts["problem"]]
        problem = (kept[world.rank] or {}).get("problem")
        if done:
            break
        if agree.gather(torch.tensor([time.monotonic() > last]), world)[0]:
            raise TrainingError(kept[0]["problem"])
        if problem:
            session.log(f"{problem}; trying again in {RETRY:.0f} s")
        time.sleep(RETRY)
    if problem:
        session.log(f"{problem}; another node has it all")
    saving.log_drift(session, [facts["written"] if facts else (0, 0) for facts in kept])
    summary = done[0]["summary"]
    session.display.text("summary", json.dumps(summary, indent=1))
    if speed := summary.get("machines"):
        session.display.write(sentence(speed))
    session.display.write(describe(summary, session.folder.path))


def _write(session: Session) -> dict[str, Any]:
    """Write one node's files; return the summary, or the problem. Raises Superseded."""
    saving.close_writer(session)
    facts: dict[str, Any] = {"problem": "", "written": session.written}
    config, manifest, folder = session.config, session.manifest, session.folder
    about = {
        "model": config.model.model_dump(mode="json"),
        "classes": manifest.classes,
        "mean": manifest.mean,
        "std": manifest.std,
        "pixels": session.plan.last_pixels,
    }
    try:
        weights = folder.export(session.state.net.state_dict(), about)
        summary = summarise(session.state, session.plan, session.outcome, session.precision, weights)
        summary["mistakes"] = mistakes(session.outcome, session.evaluated)
        report.attempt(folder.path, summary, session.evaluated, session.log, session.world.timeout)
        folder.write_summary(summary)
    except TrainingError as error:
        return facts | {"problem": str(error)}
    return facts | {"summary": summary}
