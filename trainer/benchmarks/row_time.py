"""Time and operations to accuracy on this machine's cores: our recipes against plain_ddp.py.

Environment: BENCH_MINUTES of each contender (10); BENCH_RECIPES, which of ours (demo); BENCH_RUNS, folders of finished
runs besides, whose own records make their curves, so that a training of hours need not be done again for this.
"""

from __future__ import annotations

import json
import os
from itertools import accumulate
from pathlib import Path

from harness import CannotRun, Options, plain, sets, train_steps

TITLE = "Time to accuracy, two ranks"
COMMAND = "make bench ROWS=time BENCH_MINUTES=10"
LEVELS = (0.40, 0.50, 0.60, 0.70, 0.75, 0.80, 0.85, 0.90, 0.94)
# K. Jordan's CIFAR-10 zoo: ResNet-18 with SGD, 26 epochs of the original images, mean of 200 runs; 93.4 % without TTA.
PUBLISHED = {0.94: "published, with flip TTA: 4.35 PFLOP"}
Curve = list[list[float]]  # [seconds of training, accuracy, operations in PFLOP; the last lacks in old results]


def measure(options: Options) -> dict:
    """Each contender for `minutes` of training, evaluated on the same 2,000 test images; that time left out."""
    minutes = 0.02 if options.tiny else options.minutes
    every = "2" if options.tiny else "25"
    watched = {"BENCH_EVALUATE": every, "BENCH_MINUTES": str(minutes)}
    small = {"global_batch": 20, "micro_batch": 10} if options.tiny else {}
    small |= {"hardware__threads": 1, "evaluation__every_epochs": 0, "evaluation__interim_images": 2000}
    curves = {}
    for recipe in os.environ.get("BENCH_RECIPES", "demo").split(","):
        arguments = ["--recipe", recipe, *sets(**small)]
        spent = operations(recipe, arguments[3::2], options.data)
        # One step less than the recipe has: the end of the run, evaluation and export, is not training.
        ours = train_steps(options, 2, 10**9 if options.tiny else len(spent) - 2, *arguments, **watched)
        curves[recipe] = [[seconds, at, spent[step]] for seconds, at, step in ours["curve"] if step < len(spent)]
    recorded = [Path(run) for run in os.environ.get("BENCH_RUNS", "").split(",") if run]
    curves |= {
        f"{run.name} (its records: its own images, evaluation included)": of_run(run, options.data) for run in recorded
    }
    batch = ["--batch", "10"] if options.tiny else []
    theirs = plain(options, 2, *batch, "--evaluate", every, "--minutes", str(minutes))
    curves["plain"] = [[seconds, at, step * theirs["batch"] * image() / 1e15] for seconds, at, step in theirs["curve"]]
    return {"minutes": minutes, "curves": curves, "n": 1}


def image() -> int:
    """Operations of one training image at 32 pixels."""
    from k8scifar.config.sections import Model
    from k8scifar.training import model

    return model.training_flops(model.build(Model(), 10), 32)


def operations(recipe: str, values: list[str], data: Path) -> list[float]:
    """PFLOP of the first 0, 1, ... all steps of a recipe with these `--set` values, Muon's own included."""
    from k8scifar.config import loading
    from k8scifar.data import holdout
    from k8scifar.data.packed import read_manifest
    from k8scifar.training import model, optim
    from k8scifar.training.plan import Plan

    config, manifest = loading.load(sets=values, recipe_name=recipe), read_manifest(data)
    plan = Plan(config, holdout.left(manifest, config.data.holdout))
    net = model.build(config.model, len(manifest.classes))
    images = {pixels: config.global_batch * model.training_flops(net, pixels) for pixels in plan.images_at()}
    own = optim.step_flops(optim.build(net, config))
    return [0.0, *accumulate((images[plan.pixels(step)] + own) / 1e15 for step in range(plan.steps))]


def of_run(run: Path, data: Path) -> Curve:
    """The curve that a finished run has recorded, a point an evaluation. Raises CannotRun where it is none of tests."""
    import yaml

    try:
        records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        config = yaml.safe_load((run / "config.yaml").read_text())
    except OSError as error:
        raise CannotRun(f"{error.filename} can't be read ({error.strerror}); BENCH_RUNS names run folders") from None
    points = [record for record in records if "test_accuracy" in record]
    if not points:
        raise CannotRun(f"{run} was never evaluated on test images; name another run in BENCH_RUNS")
    chosen = {key: value for key, value in config.items() if key not in ("recipe", "runs_dir", "name", "data", "log")}
    spent = operations(config["recipe"], [f"{key}={json.dumps(value)}" for key, value in chosen.items()], data)
    return [[record["seconds"], record["test_accuracy"], spent[record["step"]]] for record in points]


def draw(found: dict) -> str:
    """Accuracy over minutes, all contenders, as SVG."""
    from k8scifar.results import figures

    minutes = {name: [(point[0] / 60, point[1]) for point in curve] for name, curve in found["curves"].items()}
    return figures.svg(figures.over_minutes(minutes)) + "\n"


def lines(found: dict) -> list[tuple[str, str, str]]:
    """(what, measured, aim)."""
    curves, rows = found["curves"], []
    for level in LEVELS:
        told = [f"{name}: {_first(curve, level, found['minutes'])}" for name, curve in curves.items()]
        what = f"minutes and operations to {level:.0%} of 2,000 test images, evaluation left out, n = {found['n']}"
        rows.append((what, "; ".join(told), PUBLISHED.get(level, "")))
    best = ", ".join(f"{name} {max((point[1] for point in curve), default=0.0):.1%}" for name, curve in curves.items())
    return [*rows, ("best accuracy within that time, without TTA", best, "")]


def _first(curve: Curve, level: float, minutes: float) -> str:
    """When a level was first reached."""
    for seconds, at, *operations in curve:
        if at >= level:
            return f"{seconds / 60:.1f} min" + "".join(f", {value:.3f} PFLOP" for value in operations)
    return f"not by {curve[-1][0] / 60 if curve else minutes:.1f} min, the last look"
