"""Run the benchmarks and print their table: bench.py [ROWS...] [--data DIR] [--gpu] [--table].

Each row is a module row_NAME.py here, and its newest result a file results/NAME-DATE.json.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from harness import HERE, CannotRun, Options, machine

ROWS = ("step", "products", "data", "scaling", "unequal", "modes", "start", "time", "avx2", "gpu", "flops")
GPU_MINUTES = 10.0  # for the rows that need a GPU, unless BENCH_UNTIL is a Unix time
LONG = ("time", "avx2")  # only when asked for by name


def main(argv: list[str] | None = None) -> int:
    """Run the rows, print the table; 1 if a row failed."""
    parser = argparse.ArgumentParser(description="Measure the trainer against plain DDP.")
    parser.add_argument(
        "rows", nargs="*", help=f"of {', '.join(ROWS)}; none: all that this machine can run but {' and '.join(LONG)}"
    )
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of the packed data set (data)")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder of the results")
    parser.add_argument("--gpu", action="store_true", help="the rows that need a GPU")
    parser.add_argument("--table", action="store_true", help="only print the table, and write README.md beside this")
    parser.add_argument("--tiny", action="store_true", help="sizes that only show that the rows work")
    args = parser.parse_args(argv)
    for name in args.rows:
        if name not in ROWS:
            parser.error(f"there is no row {name!r}; the rows are {', '.join(ROWS)}")
    failed = False
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that rows tidy up behind themselves
    if not args.table:
        until = float(os.environ.get("BENCH_UNTIL") or time.time() + 60 * GPU_MINUTES) if args.gpu else float("inf")
        options = Options(args.data.resolve(), float(os.environ.get("BENCH_MINUTES") or 10), args.tiny, until)
        if not (args.data / "manifest.json").exists():
            parser.error(f"{args.data} holds no packed data set; run `k8scifar prepare` first, or give --data")
        for name in args.rows or [row for row in ROWS if row not in LONG and _needs_gpu(row) == args.gpu]:
            failed |= not run(name, options, args.results)
    text = table(args.results)
    print(text)
    if args.table and args.results == HERE / "results":
        (HERE / "README.md").write_text(text)
    return int(failed)


def run(name: str, options: Options, folder: Path) -> bool:
    """Measure one row and keep its result; False if it failed."""
    row = importlib.import_module(f"row_{name}")
    print(f"{name}: {row.TITLE}", file=sys.stderr, flush=True)
    begun, date = time.time(), time.strftime("%Y-%m-%d %H:%M", time.gmtime())
    facts = machine()
    try:
        found = row.measure(options)
    except CannotRun as reason:
        print(f"{name}: not run here: {reason}", file=sys.stderr, flush=True)
        return True
    except Exception as error:
        print(f"{name}: failed: {error}", file=sys.stderr, flush=True)
        return False
    result = {"row": name, "date": date, "took": round(time.time() - begun), "tiny": options.tiny} | facts
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}.json"
    path.write_text(json.dumps(result | {"found": found}, indent=1) + "\n")
    if draw := getattr(row, "draw", None):
        (folder / f"{name}.svg").write_text(draw(found))
    return True


def newest(name: str, folder: Path) -> dict[str, dict[str, Any]]:
    """A row's newest results: that of a whole processor under "", and by the instructions that one was held to."""
    results = [json.loads(path.read_text()) for path in sorted(folder.glob(f"{name}-*.json"))]
    return {result["machine"].partition(", held to ")[2]: result for result in results}


def table(folder: Path) -> str:
    """The table of the newest results, Markdown."""
    text = [
        "# Measurements",
        "",
        "Made by `python trainer/benchmarks/bench.py --table` from the newest result of each row; held to AVX2 and the",
        "like: by ONEDNN_MAX_CPU_ISA, ATEN_CPU_CAPABILITY and MKL_ENABLE_INSTRUCTIONS.",
        "",
    ]
    text += ["| row | what | measured | aim |", "|---|---|---|---|"]
    notes = []
    for name in ROWS:
        row, results = importlib.import_module(f"row_{name}"), newest(name, folder)
        if not results:
            why = "needs a GPU: make bench-gpu" if _needs_gpu(name) else f"not measured yet: {row.COMMAND}"
            text.append(f"| {name} | {row.TITLE} | {why} | |")
        for held, result in sorted(results.items()):
            shown = f"{name}, held to {held}" if held else name
            text += [f"| {shown} | {what} | {value} | {aim} |" for what, value, aim in row.lines(result["found"])]
            note = f"- `{row.COMMAND}`: {row.TITLE}. {result['date']} UTC, {result['gpu'] or result['machine']}, "
            note += f"torch {result['versions']['torch']}, {result['took']} s; load before it {result['load']:.1f}"
            notes.append(note + ("; **tiny sizes, no measurement**" if result["tiny"] else ""))
    text += ["", "Median (least to greatest, n) where n is given so; contenders run in turn within one run.", ""]
    return "\n".join([*text, *notes]) + "\n"


def _needs_gpu(name: str) -> bool:
    return getattr(importlib.import_module(f"row_{name}"), "GPU", False)


if __name__ == "__main__":
    raise SystemExit(main())
