"""The report of a finished run: one HTML page that holds everything it shows, `report.html` in the run folder.

It is made from what the run left behind: config.yaml, metrics.jsonl, TensorBoard's events (for the step curves and the
time split) and the summary; the images of the evaluation are needed for the mistakes only.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import io
import json
import logging
import threading
import warnings
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import k8scifar
from k8scifar.data import holdout, packed
from k8scifar.errors import UserError
from k8scifar.files import write_atomically
from k8scifar.results import ownership, participants
from k8scifar.results.evaluated import figure, word_of
from k8scifar.results.speedup import sentence
from k8scifar.results.summary import MARKER, beside, read_summary, with_todays_names
from k8scifar.urls import local

NAME = "report.html"
PAIRS = 6  # of classes most often taken for each other
POINTS = 1000  # of a step curve
Curve = list[tuple[int, float]]  # (step, value)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Command line of `k8scifar report`."""
    parser.add_argument("run_dir", type=local, metavar="RUN", help="the folder of a finished run, such as runs/demo")
    parser.add_argument(
        "--data-dir", type=local, metavar="DIR", help="folder of the packed data set, to show the worst mistakes"
    )


def run(args: argparse.Namespace) -> int:
    """`k8scifar report`: write the report of a finished run again."""
    folder = args.run_dir
    with contextlib.suppress(OSError):  # then it can't be read either
        ownership.check_owner(folder, adopt=False)
    summary = read_summary(folder)
    if summary is None:
        raise UserError(f"{folder} is not the folder of a finished run: it has no {MARKER}; train it first")
    split = _evaluated(args.data_dir, summary) if args.data_dir else None
    try:
        print(write(folder, summary, split))
    except OSError as error:
        raise UserError(f"{folder / NAME} can't be written: {error.strerror}; check its owner and the space") from None
    return 0


def attempt(
    folder: Path, summary: dict[str, Any], split: packed.Split, say: Callable[[str], None], seconds: float
) -> None:
    """Write the report; where that fails or takes longer than `seconds`, say so in a line.

    A trained model is worth more than its report, and the other ranks wait meanwhile.
    """
    made: list[str | Exception] = []

    def make() -> None:
        try:
            made.append(page(folder, summary, split))
        except Exception as error:
            made.append(error)

    thread = threading.Thread(target=make, daemon=True)
    thread.start()
    thread.join(seconds)
    outcome = made[0] if made else TimeoutError(f"it takes longer than {seconds:.0f} s")
    try:
        if isinstance(outcome, Exception):
            raise outcome
        write_atomically(folder / NAME, outcome.encode())
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        say(f"no report was written ({reason}); `k8scifar report {folder}` tries again")


def write(folder: Path, summary: dict[str, Any], split: packed.Split | None) -> Path:
    """Write the report of the run in `folder`; returns its path. Raises OSError.

    Args:
        summary: what summary.json holds, or will hold.
        split: the images of the evaluation, None where they are not at hand.
    """
    path = folder / NAME
    write_atomically(path, page(folder, summary, split).encode())
    return path


def page(folder: Path, summary: dict[str, Any], split: packed.Split | None) -> str:
    """The report as HTML; the same for the same inputs."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"percent": lambda value: f"{value:.2%}", "thousands": lambda value: f"{value:,}"}
    history, curves, times = _history(folder), *_events(folder)
    classes = list(summary["per_class"])
    return environment.get_template(NAME).render(
        name=folder.resolve().name,
        summary=summary,
        evaluated=word_of(summary),
        figure=figure,
        beside=beside(summary),
        took_part=participants.told(summary.get("members", [])),
        duration=_duration(summary["seconds"]),
        when=times,
        plots=_plots(history, curves, summary),
        classes=summary["per_class"],
        pairs=_pairs(summary["confusion"], classes),
        mistakes=_mistakes(summary.get("mistakes", []), classes, split),
        split=split is not None,
        parts=time_parts(curves, summary),
        machines=_machines(summary),
        history=history,
        config=_text(folder / "config.yaml"),
        version=k8scifar.__version__,
    )


def time_parts(curves: dict[str, Curve], summary: dict[str, Any]) -> list[dict[str, Any]]:
    """Where the run's time went on rank 0: name, seconds and share of each part; empty where nothing was recorded."""
    before = 0
    spent = dict.fromkeys(("data", "compute", "communication"), 0.0)
    rates = dict(curves.get("step/images_per_second", []))
    shares = {part: dict(curves.get(f"time/{part}", [])) for part in spent}
    for step in sorted(rates):
        seconds = (step - before) * summary["global_batch"] / rates[step] if rates[step] > 0 else 0.0
        before = step
        for part in spent:
            spent[part] += shares[part].get(step, 0.0) * seconds
    if not sum(spent.values()):
        return []
    words = {"data": "augmenting images", "compute": "computing", "communication": "waiting for other ranks"}
    rest = max(0.0, summary["seconds"] - sum(spent.values()))
    named = [(part, words[part], seconds) for part, seconds in spent.items()]
    named.append(("rest", "evaluating, saving, starting", rest))
    total = sum(seconds for *_, seconds in named)
    return [{"part": part, "name": name, "seconds": seconds, "share": seconds / total} for part, name, seconds in named]


def _evaluated(folder: Path, summary: dict[str, Any]) -> packed.Split:
    from k8scifar.data.prepare import require

    manifest = require(folder)
    if manifest.fingerprint != summary["data"]["fingerprint"]:
        raise UserError(
            f"{folder} holds other data ({manifest.source}) than the run was trained on "
            f"({summary['data']['source']}); point --data-dir at that"
        )
    return holdout.splits(folder, manifest, summary["identity"].get("data.holdout", 0))[1]


def _history(folder: Path) -> list[dict[str, Any]]:
    records = []
    for line in _text(folder / "metrics.jsonl").splitlines():
        with contextlib.suppress(ValueError):
            records.append(with_todays_names(json.loads(line)))
    return records


def _events(folder: Path) -> tuple[dict[str, Curve], list[str]]:
    """The step curves that TensorBoard's events hold, and when the first and the last of them were written (UTC)."""
    from tensorboard.backend.event_processing import event_accumulator

    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    if not list(folder.glob("events.*")):
        return {}, []
    none = {
        event_accumulator.IMAGES: 1,
        event_accumulator.TENSORS: 1,
        event_accumulator.HISTOGRAMS: 1,
        event_accumulator.COMPRESSED_HISTOGRAMS: 1,
        event_accumulator.AUDIO: 1,
    }
    events = event_accumulator.EventAccumulator(str(folder), none | {event_accumulator.SCALARS: 0}).Reload()
    found = {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}
    moments = [point.wall_time for points in found.values() for point in points]
    ends = (min(moments), max(moments)) if moments else ()
    times = [datetime.fromtimestamp(moment, timezone.utc).strftime("%Y-%m-%d %H:%M") for moment in ends]
    return {tag: [(point.step, point.value) for point in points] for tag, points in found.items()}, times


def _plots(history: list[dict[str, Any]], curves: dict[str, Curve], summary: dict[str, Any]) -> list[dict[str, Any]]:
    """Title and SVG (marked as safe) of each figure."""
    import torch
    from markupsafe import Markup

    from k8scifar.results import figures

    per_epoch, word = summary["steps"] / summary["epochs"], word_of(summary)

    def by_epoch(key: str) -> list[tuple[float, float]]:
        return [(record["epoch"], record[key]) for record in history if record.get(key) is not None]

    def evaluated(name: str) -> list[tuple[float, float]]:
        return [(record["epoch"], value) for record in history if (value := figure(record, name)) is not None]

    def by_step(tag: str) -> list[tuple[float, float]]:
        points = curves.get(tag, [])
        return [(step / per_epoch, value) for step, value in points[:: max(1, -(-len(points) // POINTS))]]

    lines = {
        "Loss": {"each step": by_step("step/loss"), "training": by_epoch("train_loss"), word: evaluated("loss")},
        "Accuracy": {"training": by_epoch("train_accuracy"), word: evaluated("accuracy")},
        "Learning rate": {"training": by_step("step/lr") or by_epoch("lr")},
        "Images a second, all ranks": {
            "each step": by_step("step/images_per_second"),
            "training": by_epoch("images_per_second"),
        },
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # glyphs that the measuring font lacks: the browser has others
        made = [
            {"title": title, "svg": Markup(figures.svg(figures.curves(series, percent=title == "Accuracy")))}
            for title, series in lines.items()
            if any(series.values())
        ]
        matrix = figures.confusion(torch.tensor(summary["confusion"]), list(summary["per_class"]))
        made.append({"title": "Confusion matrix", "svg": Markup(figures.svg(matrix))})
    return made


def _machines(summary: dict[str, Any]) -> dict[str, Any] | None:
    """Sentence, SVG and shares of a run on several machines; None of others."""
    if not (speed := summary.get("machines")):
        return None
    from markupsafe import Markup

    from k8scifar.results import figures

    alone = {f"node {node} alone": rate for node, rate in enumerate(speed["alone"])}
    picture = figures.bars(alone | {"together": speed["together"]}, sum(speed["alone"]))
    return {"sentence": sentence(speed), "svg": Markup(figures.svg(picture)), "shares": speed["shares"]}


def _pairs(confusion: list[list[int]], classes: list[str]) -> list[dict[str, Any]]:
    """The classes most often taken for another."""
    found = [
        {"true": classes[row], "predicted": classes[column], "count": count, "share": count / max(1, sum(counts))}
        for row, counts in enumerate(confusion)
        for column, count in enumerate(counts)
        if row != column and count
    ]
    return sorted(found, key=lambda pair: (-pair["share"], pair["true"], pair["predicted"]))[:PAIRS]


def _mistakes(mistakes: list[dict], classes: list[str], split: packed.Split | None) -> list[dict[str, Any]]:
    """Each mistake with its image as a data: address."""
    if split is None:
        return []
    from PIL import Image

    made = []
    for mistake in mistakes:
        content = io.BytesIO()
        Image.fromarray(split.images[mistake["image"]]).save(content, "PNG")
        address = "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()
        names = {key: classes[mistake[key]] for key in ("true", "predicted")}
        made.append(mistake | names | {"address": address})
    return made


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _text(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text()
    return ""
