"""The same steps on 1, 2, 4, ... ranks of this machine: speed-up and efficiency beside the ideal.

scaling.py [--data DIR] [--ranks N] [--steps N] [--out DIR] [k8scifar train's options ...]
scaling.py --draw FILE [--out DIR]     draws what was measured elsewhere, as `make scaling NODES=2` does in a cluster
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from harness import Options, machine, sets, spread, train_steps


def main(argv: list[str] | None = None) -> int:
    """Measure, draw, print the table."""
    from k8scifar import machine as hardware

    parser = argparse.ArgumentParser(description="Measure how training scales with the ranks of this machine.")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of the packed data set (data)")
    parser.add_argument("--ranks", type=int, default=0, help="most ranks (this machine's GPUs, else its cores)")
    parser.add_argument("--steps", type=int, default=10, help="steps of each measurement, after a first one (10)")
    parser.add_argument("--out", type=Path, default=Path("results"), help="of scaling.png and scaling.md (results)")
    parser.add_argument("--draw", type=Path, help="measure nothing: draw the figures in this JSON file")
    args, others = parser.parse_known_args(argv)
    if args.draw:
        return draw(json.loads(args.draw.read_text()), args.out)
    most = args.ranks or hardware.usable_gpus({}) or hardware.usable_cpus()
    if most < 1 or args.steps < 1:
        parser.error("--ranks and --steps must be 1 or more")
    ranks = sorted({2**power for power in range(most.bit_length()) if 2**power <= most} | {most})
    # As many micro-batches as there are ranks at most; one thread each, or the ideal would not be a straight line.
    values = {"global_batch": 125 * most, "micro_batch": 125, "hardware__threads": 1, "distributed__comm": "allreduce"}
    options, rates = Options(args.data.resolve(), 0.0), []
    for count in ranks:
        found = train_steps(options, count, args.steps + 1, *sets(**values), *others)
        rates.append(found["batch"] / spread(found["steps"])["median"])
        print(f"  {count} rank(s): {rates[-1]:,.1f} images/s", file=sys.stderr, flush=True)
    facts = machine()
    note = f"{facts['gpu'] or facts['machine']}, torch {facts['versions']['torch']}; the median step; n = 1."
    write(args.out, ranks, rates, table(ranks, rates, note))
    return 0


def draw(found: dict, folder: Path) -> int:
    """What was measured elsewhere. Keys: unit (nodes), measured [count, images_per_second], note (under the table)."""
    counts = [each["count"] for each in found["measured"]]
    rates = [each["images_per_second"] for each in found["measured"]]
    write(folder, counts, rates, table(counts, rates, found["note"], found["unit"]), found["unit"])
    return 0


def table(counts: list[int], rates: list[float], note: str, unit: str = "ranks") -> str:
    """Markdown: number of `unit`, images/s, speed-up, efficiency, and a note on what measured."""
    lines = [f"| {unit} | images/s | speed-up | efficiency |", "|---|---|---|---|"]
    for count, rate in zip(counts, rates, strict=True):
        speedup = rate / rates[0]
        lines.append(f"| {count} | {rate:,.1f} | {speedup:.2f} | {speedup / count:.2f} |")
    return "\n".join([*lines, "", note])


def write(folder: Path, counts: list[int], rates: list[float], text: str, unit: str = "ranks") -> None:
    """The picture and the table, as files; the table on the screen, too."""
    from k8scifar.results import figures

    print(text)
    folder.mkdir(parents=True, exist_ok=True)
    figures.scaling(counts, rates, unit).savefig(folder / "scaling.png", dpi=200)
    (folder / "scaling.md").write_text(text + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
