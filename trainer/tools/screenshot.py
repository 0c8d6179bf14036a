"""Takes README's picture of TensorBoard: a short real run on two ranks, served and opened in headless Chromium.

`make screenshot DATA=imagefolder:PATH` calls it; a run that is there already is shown as it is.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import urllib.parse
from pathlib import Path

import browser

NAME = "screenshot"
# Short, at low resolution: the picture shows how learning looks, not how well it can be done.
SETTINGS = ("epochs=4", "resolution=[{until: 0.6, pixels: 12}, {until: 1.0, pixels: 16}]")
CARDS = ("test/accuracy", "step/loss", "train/accuracy", "step/lr")
PICTURES = ("test/confusion", "test/worst_mistakes")
WIDTH, HEIGHT = 1640, 1165
LARGEST = 300_000  # bytes


def main() -> int:
    """Train if need be, take the picture, write it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"))
    parser.add_argument("--output", type=Path, default=Path("chart/docs/tensorboard.png"))
    args = parser.parse_args()
    run = args.runs_dir / NAME
    if not (run / "summary.json").exists():
        sets = [part for value in SETTINGS for part in ("--set", value)]
        paths = ("--data-dir", args.data_dir, "--runs-dir", str(args.runs_dir), "--name", NAME)
        subprocess.run([sys.executable, "-m", "k8scifar", "launch", "--nproc-per-node=2", *sets, *paths], check=True)
    with tempfile.TemporaryDirectory() as alone:  # without the other runs of the folder
        (Path(alone) / NAME).symlink_to(run.resolve())
        picture = take(Path(alone))
    if len(picture) > LARGEST:
        print(f"error: the picture has {len(picture):,} bytes, more than {LARGEST:,}", file=sys.stderr)
        return 1
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_bytes(picture)
    print(f"{args.output}: {len(picture):,} bytes, of run {run}")
    return 0


def take(folder: Path) -> bytes:
    """A PNG of TensorBoard's time series of the run in `folder`, with the cards that tell most pinned on top."""
    pins = [{"plugin": "scalars", "tag": tag} for tag in CARDS]
    pins += [{"plugin": "images", "tag": tag, "runId": f"defaultExperimentId/{NAME}", "sample": 0} for tag in PICTURES]
    query = urllib.parse.urlencode({"pinnedCards": json.dumps(pins), "smoothing": 0})
    with browser.tensorboard(folder) as address, browser.chromium(WIDTH, HEIGHT) as page:
        page.get(f"{address}?{query}#timeseries")
        pinned = "document.querySelector('metrics-pinned-view')"
        browser.until(page, f"{pinned}.querySelectorAll('tb-data-table-content-row').length >= {len(CARDS)}")
        # Charts to the ends of their curves, and room for them.
        outliers = "[...document.querySelectorAll('mat-checkbox')].find(b => b.innerText.includes('Ignore outliers'))"
        page.execute_script(f"{outliers}.querySelector('input').click()")
        close = "[...document.querySelectorAll('button')].find(b => b.innerText.includes('Settings'))"
        page.execute_script(f"{close}.click()")
        shown = f"[...{pinned}.querySelectorAll('img')].filter(i => i.complete && i.naturalWidth)"
        browser.until(page, f"{shown}.length >= {len(PICTURES)}")
        return browser.settled(page)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (LookupError, TimeoutError, subprocess.CalledProcessError) as error:
        sys.exit(f"error: {error}")
