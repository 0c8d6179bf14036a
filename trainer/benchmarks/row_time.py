"""Time to accuracy on this machine's cores: recipe demo against plain_ddp.py."""

from __future__ import annotations

from harness import Options, plain, sets, train_steps

TITLE = "Time to accuracy, two ranks"
COMMAND = "make bench ROWS=time BENCH_MINUTES=10"
LEVELS = (0.40, 0.50, 0.60, 0.70, 0.75, 0.80, 0.85)


def measure(options: Options) -> dict:
    """Each contender for `minutes` of training, evaluated on the same 2,000 test images; that time left out."""
    from k8scifar.config import loading
    from k8scifar.data.packed import read_manifest
    from k8scifar.training.plan import Plan

    minutes = 0.02 if options.tiny else options.minutes
    every = "2" if options.tiny else "25"
    small = {"global_batch": 20, "micro_batch": 10} if options.tiny else {}
    arguments = sets(**small, hardware__threads=1, evaluation__every_epochs=0)
    watched = {"BENCH_EVALUATE": every, "BENCH_MINUTES": str(minutes)}
    # One step less than the recipe has: the end of the run, evaluation and export, is not training.
    steps = 10**9 if options.tiny else Plan(loading.load(), read_manifest(options.data).counts["train"]).steps - 1
    ours = train_steps(options, 2, steps, *arguments, **watched)
    batch = ["--batch", "10"] if options.tiny else []
    theirs = plain(options, 2, *batch, "--evaluate", every, "--minutes", str(minutes))
    contenders = {"demo": ours, "plain": theirs}
    return {
        "minutes": minutes,
        "reached": {name: _reached(found["curve"]) for name, found in contenders.items()},
        "best": {name: max((at for _, at in found["curve"]), default=0.0) for name, found in contenders.items()},
        "curves": {name: found["curve"] for name, found in contenders.items()},
        "n": 1,
    }


def _reached(curve: list) -> dict[str, float | None]:
    """Seconds at which each level was first reached."""
    return {f"{level:.0%}": next((spent for spent, at in curve if at >= level), None) for level in LEVELS}


def lines(found: dict) -> list[tuple[str, str, str]]:
    """(what, measured, aim)."""
    rows = []
    for level in found["reached"]["demo"]:
        told = []
        for name in ("demo", "plain"):
            seconds = found["reached"][name][level]
            at = f"not reached in {found['minutes']:g} min" if seconds is None else f"{seconds / 60:.1f} min"
            told.append(f"{name}: {at}")
        rows.append(
            (f"minutes to {level} of 2,000 test images, evaluation left out, n = {found['n']}", "; ".join(told), "")
        )
    best = ", ".join(f"{name} {value:.1%}" for name, value in found["best"].items())
    return [*rows, ("best accuracy within that time", best, "")]
