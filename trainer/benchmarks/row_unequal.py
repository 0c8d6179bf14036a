"""Two hosts of a core each, one held to half of it by cgroup quota: shares by speed against equal ones; needs root."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from harness import HERE, CannotRun, Options, shown, spread
from row_scaling import CORES, start, step

TITLE = "Two hosts, one held to half a core"
COMMAND = "make bench ROWS=unequal (root)"
QUOTA = 0.5  # of a core
REPEATS = 3
PERIOD = 5_000  # microseconds in which it is used up: a slow machine is slow all the time, not stopped now and then


def measure(options: Options) -> dict:
    """Recipe demo's first stage with its own batches and `auto` communication; seconds of the mean step.

    "Alone" is each host training by itself, one after the other, the quota in force.
    """
    sys.path.insert(0, str(HERE.parent / "tests" / "helpers"))
    if os.geteuid() or not all(map(shutil.which, ("ip", "unshare", "taskset"))) or (os.cpu_count() or 1) < 2:
        raise CannotRun("needs root, two cores, ip, unshare and taskset")
    import hosts

    from k8scifar.config import loading

    recipe = loading.load()
    values = {"global_batch": recipe.global_batch, "micro_batch": recipe.micro_batch}
    if options.tiny:
        values = {"global_batch": 12, "micro_batch": 2}
    repeats = 1 if options.tiny else REPEATS
    rates: dict[str, list[float]] = {}
    said: list[str] = []
    with quota(QUOTA) as group, hosts.several(tuple(CORES)) as pair:

        def hold(host: str, process: int) -> None:  # what it starts is held with it
            if host == pair[1].name:
                (group / "cgroup.procs").write_text(str(process))

        for name, machines, share in [
            ("alone 0", pair[:1], "equal"),
            ("alone 1", pair[1:], "equal"),
            ("equal", pair, "equal"),
            ("auto", pair, "auto"),
        ] * repeats:
            found = start(
                machines, options, "auto", together=len(machines) == 2, started=hold,
                values=values | {"distributed__share": share}, steps=4 if options.tiny else 13,
            )  # fmt: skip
            rates.setdefault(name, []).append(values["global_batch"] / step(found))
            if name == "auto":
                said.append("; ".join(filter(None, (found["shares"], found["label"]))))
            print(f"  {name}: {rates[name][-1]:.1f} images/s", flush=True)
    return {"rates": rates, "said": said, "n": repeats}


@contextlib.contextmanager
def quota(cores: float) -> Iterator[Path]:
    """A cgroup (version 1 or 2) whose processes have this many cores between them. Raises CannotRun."""
    first, second = Path("/sys/fs/cgroup/cpu"), Path("/sys/fs/cgroup")
    folder = (first if first.is_dir() else second) / f"k8scifar-bench-{os.getpid()}"
    try:
        folder.mkdir()
        if first.is_dir():
            (folder / "cpu.cfs_period_us").write_text(str(PERIOD))
            (folder / "cpu.cfs_quota_us").write_text(str(int(cores * PERIOD)))
        else:
            (folder / "cpu.max").write_text(f"{int(cores * PERIOD)} {PERIOD}")
    except OSError as error:
        with contextlib.suppress(OSError):
            folder.rmdir()
        raise CannotRun(f"needs a cgroup that can be written, to hold a host to half a core: {error}") from None
    try:
        yield folder
    finally:
        with contextlib.suppress(OSError):
            folder.rmdir()


def lines(found: dict) -> list[tuple[str, str, str]]:
    """(what, measured, aim)."""
    rates = {name: runs if isinstance(runs, list) else [runs] for name, runs in found["rates"].items()}  # former: one
    said = [found["said"]] if isinstance(found["said"], str) else found["said"]
    taken = dict.fromkeys(f"{text.partition('; ')[0]}, {text.rpartition('; ')[2]}" for text in said)
    rounds = [dict(zip(rates, round_, strict=True)) for round_ in zip(*rates.values(), strict=True)]
    over_equal = spread([rate["auto"] / rate["equal"] for rate in rounds])
    over_sum = spread([rate["auto"] / (rate["alone 0"] + rate["alone 1"]) for rate in rounds])
    told = ", ".join(f"{name} {shown(spread(runs))}" for name, runs in rates.items())
    return [
        ("images/s", f"{told} ({'; '.join(taken)})", ""),
        ("shares by speed over equal ones", shown(over_equal, "x"), "1.33x"),
        ("shares by speed over the sum of both hosts alone", shown(over_sum), "0.9"),
    ]
