"""The measurements of `make scaling NODES=2` in scaling.json, and their table and picture."""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
from pathlib import Path
from typing import Any

from kube import ROOT, ToolError

DRAW = ROOT / "trainer" / "benchmarks" / "scaling.py"


class Record:
    """What has been measured with one set of values; the file is written after each training."""

    def __init__(self, folder: Path, digest: str) -> None:
        """Go on with the folder's measurements of these values; keep those of other values under another name."""
        self.folder, self.path = folder, folder / "scaling.json"
        self.content: dict[str, Any] = {"series": secrets.token_hex(3), "key": digest, "unit": "nodes", "measured": []}
        if self.path.exists():
            try:
                before = json.loads(self.path.read_text())
                series, same = before["series"], before["key"] == digest
            except (OSError, ValueError, KeyError, TypeError):
                raise ToolError(f"make scaling did not write {self.path}: move it away") from None
            if same:
                self.content = before
            elif before["measured"]:
                former = self.path.with_stem(f"scaling-{series}")
                self.path.rename(former)
                print(f"{self.path} was measured with other values: kept as {former}", flush=True)
        self._save()

    @property
    def series(self) -> str:
        """The name of this series of measurements."""
        return self.content["series"]

    @property
    def measured(self) -> dict[int, dict[str, Any]]:
        """The figures so far, by number of nodes."""
        return {each["count"]: each for each in self.content["measured"]}

    def add(self, figures: dict[str, Any]) -> None:
        """Add the figures of another number of nodes."""
        self.content["measured"] = [*self.content["measured"], figures]
        self.content["measured"].sort(key=lambda each: each["count"])
        self._save()

    def draw(self, where: str) -> None:
        """Write the picture and the table. Raises ToolError."""
        self.content["note"] = note(self.content["measured"], where)
        self._save()
        if not draw(self.path, self.folder):
            raise ToolError(f"the picture could not be drawn; the measurements are kept in {self.path}")
        print(f"\nkept in {self.folder}: scaling.png, scaling.md, {self.path.name}", flush=True)

    def _save(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            begun = self.path.with_suffix(".tmp")
            begun.write_text(json.dumps(self.content, indent=1) + "\n")
            begun.replace(self.path)
        except OSError as error:
            raise ToolError(f"{error.filename or self.path} can't be written: {error.strerror}") from None


def draw(path: Path, folder: Path) -> bool:
    """Draw a file's measurements into a folder and return whether that worked."""
    return subprocess.run([sys.executable, str(DRAW), "--draw", str(path), "--out", str(folder)]).returncode == 0


def note(measured: list[dict[str, Any]], where: str) -> str:
    """The text under the table: what was measured, and on which machines."""
    one = measured[0]
    ranks = f"{one['ranks']} rank(s) on each node, " if one["ranks"] > 1 else ""
    lines = [
        f"Images/s of epoch {one['epochs']}, evaluation apart; global batch {one['global_batch']}, {ranks}"
        f"{one['device']}, torch {one['torch']}; n = 1; {where}.",
        f"Speed-up is over one node, {one['machines'][0]}.",
    ]
    for each in measured[1:]:
        text = f"{each['count']} nodes ({', '.join(each['machines'])}): {each['comm']}"
        if alone := each.get("alone"):
            rates, part = alone["alone"], alone["together"] / sum(alone["alone"])
            text += (
                f"; {', '.join(f'{rate:,.1f}' for rate in rates)} images/s alone at {alone['pixels']} pixels, "
                f"{alone['together']:,.1f} together, {part:.2f} of their sum"
            )
        lines.append(f"{text}.")
    if one["epochs"] == 1 and not one["device"].startswith("cpu"):
        lines.append("The first epoch of a GPU compiles: EPOCHS=3 measures one that does not.")
    return "\n".join(lines)
