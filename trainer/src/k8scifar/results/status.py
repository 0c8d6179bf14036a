"""Say from its run folder what a training is doing: waiting, training, done, or failed and why."""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from pathlib import Path
from typing import Any

from k8scifar.errors import FAILED, UserError
from k8scifar.results import node_status, ownership, participants
from k8scifar.results.evaluated import PREFIXES, figure, word_of
from k8scifar.results.summary import beside, read_summary
from k8scifar.urls import local


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("run_dir", type=local, metavar="RUN", help="the run folder, such as runs/demo")
    parser.add_argument(
        "--wait", type=float, default=0.0, metavar="SECONDS", help="how long to watch for training to move (0)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Exit code 0: done, or training was seen to move; 1: it waits, has failed, or stands still."""
    end, before = time.monotonic() + args.wait, progress(args.run_dir)
    found = look(args.run_dir)
    while found["state"] != "done" and time.monotonic() < end:
        time.sleep(min(2.0, max(0.1, end - time.monotonic())))
        found = look(args.run_dir)
        if progress(args.run_dir) != before and found["state"] == "training":
            found["moves"] = True
            break
    print(json.dumps(found, indent=1) if args.json else describe(args.run_dir, found, args.wait))
    return 0 if found["state"] == "done" or found.get("moves") else FAILED


def look(run_dir: Path) -> dict[str, Any]:
    """The run's state (waiting, training, stopped, failed or done) with what is known about it."""
    try:
        ownership.check_owner(run_dir, adopt=False)
    except UserError as error:
        return {"state": "failed", "nodes": {}, "reason": str(error)}
    except OSError:
        pass  # a volume that is away: what can be read is told below
    nodes = node_status.read(run_dir)
    found: dict[str, Any] = {"state": "waiting", "nodes": {str(node): note for node, note in nodes.items()}}
    last = last_epoch(run_dir)
    if last:
        accuracies = [f"{prefix}accuracy" for prefix in PREFIXES.values()]
        found |= {key: last[key] for key in ("epoch", "step", "train_loss", *accuracies, "data") if key in last}
    if summary := read_summary(run_dir):
        keys = ("accuracy", "accuracy_tta", "epochs", "seconds", "world_size", "data")
        images = {key: summary[key] for key in ("test_images", "heldout_images") if key in summary}
        return found | {key: summary.get(key) for key in keys} | images | {"state": "done"}
    told = participants.read(run_dir)
    present = (told.get("members") or [{}])[-1].get("nodes", list(nodes))
    if len(present) < told.get("most", 0):
        found["present"] = present
    for state in ("failed", "stopped"):  # of those who take part: the others go on without the rest
        states = {node: note for node, note in nodes.items() if node in present and note.get("state") == state}
        if reasons := [f"node {node}: {note.get('reason')}" for node, note in states.items()]:
            return found | {"state": state, "reason": "; ".join(reasons)}
    if any(note.get("state") == "training" for note in nodes.values()) or (last and not nodes):
        found["state"] = "training"
    return found


def last_epoch(run_dir: Path) -> dict[str, Any] | None:
    """The last whole line of metrics.jsonl, None where there is none."""
    with contextlib.suppress(OSError):
        for line in reversed((run_dir / "metrics.jsonl").read_text().splitlines()):
            with contextlib.suppress(ValueError):
                return json.loads(line)
    return None


def progress(run_dir: Path) -> dict[str, tuple[int, int]]:
    """Size and modification time (ns) of every file that training writes as it goes."""
    seen = {}
    with contextlib.suppress(OSError):
        for path in [*run_dir.glob("events.*"), *run_dir.glob("metrics.jsonl"), *run_dir.glob("checkpoints/*")]:
            with contextlib.suppress(OSError):
                status = path.stat()
                seen[str(path)] = (status.st_size, status.st_mtime_ns)
    return seen


def describe(run_dir: Path, found: dict[str, Any], waited: float) -> str:
    """The state in one line, and one line for each node that is in another state than the run."""
    state = found["state"]
    if state == "done":
        tta = f" (with flip TTA {found['accuracy_tta']:.2%})" if found.get("accuracy_tta") is not None else ""
        text = f"done: {word_of(found)} accuracy {found['accuracy']:.2%}{beside(found)}{tta}"
        text += f" after {found['epochs']} epochs"
    elif state == "training":
        text = f"training, {found['epoch']} epoch(s) finished" if "epoch" in found else "training, in its first epoch"
        if (accuracy := figure(found, "accuracy")) is not None:
            text += f", {word_of(found)} accuracy {accuracy:.2%}{beside(found)}"
        if "present" in found:
            text += f", on {participants.named(found['present'])} alone"
        if not found.get("moves"):
            text += f"; nothing was written in {waited:.0f} s" if waited else ""
    elif state in ("failed", "stopped"):
        text = f"{state}: {found['reason']}"
    else:
        text = "waiting: no node has started to train" + (
            "" if found["nodes"] else "; look at the pods' init containers"
        )
    lines = [f"{run_dir.name}: {text}"]
    for node, note in found["nodes"].items():
        if note.get("state") != state or (state == "waiting" and note.get("reason")):
            reason = f" ({note['reason']})" if note.get("reason") else ""
            lines.append(f"  node {node}: {note.get('state')}{reason}")
        if note.get("alone"):
            lines.append(f"  this is what node {node} knows: the others keep their notes in folders of their own")
    return "\n".join(lines)
