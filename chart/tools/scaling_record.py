"""What `make scaling` has measured in a cluster: kept as it comes, drawn at the end."""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
from pathlib import Path
from typing import Any

from kube import ROOT, ToolError

DRAW = ROOT / "trainer" / "benchmarks" / "scaling.py"
RECORD = "scaling.json"  # in the folder of results


class Series:
    """What has been measured with one set of values, kept in a file as it comes."""

    def __init__(self, folder: Path, key: str) -> None:
        """Go on with what the folder holds of these values; what it holds of others is kept beside."""
        self.folder, self.path = folder, folder / RECORD
        self.found: dict[str, Any] = {"series": secrets.token_hex(3), "key": key, "unit": "nodes", "measured": []}
        if self.path.exists():
            try:
                before = json.loads(self.path.read_text())
                series, same = before["series"], before["key"] == key
            except (OSError, ValueError, KeyError, TypeError):
                raise ToolError(f"{self.path} is none that make scaling wrote: move it away") from None
            if same:
                self.found = before
            elif before["measured"]:
                former = self.path.with_stem(f"scaling-{series}")
                self.path.rename(former)
                print(f"{self.path} was measured with other values: kept as {former}", flush=True)
        self.save()

    @property
    def name(self) -> str:
        """What tells this series from all others."""
        return self.found["series"]

    @property
    def measured(self) -> dict[int, dict[str, Any]]:
        """What each number of nodes came to, so far."""
        return {each["count"]: each for each in self.found["measured"]}

    def add(self, figures: dict[str, Any]) -> None:
        """Keep another number of nodes."""
        done = self.measured | {figures["count"]: figures}
        self.found["measured"] = [done[count] for count in sorted(done)]
        self.save()

    def save(self) -> None:
        """Write the file as a whole or not at all. Raises ToolError."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            begun = self.path.with_suffix(".tmp")
            begun.write_text(json.dumps(self.found, indent=1) + "\n")
            begun.replace(self.path)
        except OSError as error:
            raise ToolError(f"{error.filename or self.path} can't be written: {error.strerror}") from None

    def draw(self, where: str) -> None:
        """The picture and the table of what has been measured. Raises ToolError."""
        self.found["note"] = note(self.found["measured"], where)
        self.save()
        if not draw(self.path, self.folder):
            raise ToolError(f"the picture could not be drawn; what was measured is kept in {self.path}")
        print(f"\nkept in {self.folder}: scaling.png, scaling.md, {RECORD}", flush=True)


def draw(path: Path, folder: Path) -> bool:
    """Draw what a file holds into a folder; whether that was done."""
    return subprocess.run([sys.executable, str(DRAW), "--draw", str(path), "--out", str(folder)]).returncode == 0


def note(measured: list[dict[str, Any]], where: str) -> str:
    """What stands under the table: what was measured, and on which machines."""
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
