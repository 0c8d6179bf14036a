"""Write trainer/README.md: the package's parts, who may import whom, and a line for each file. `make source-map`."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

TRAINER = Path(__file__).resolve().parents[1]
PACKAGE = TRAINER / "src/k8scifar"
# Data flows down this list: each part and the parts that it may import beside itself and the single modules.
PARTS = {
    "config": (),
    "data": (),
    "ranks": ("config",),
    "exchange": ("config", "ranks"),
    "results": ("config", "data"),
    "training": ("config", "data", "ranks", "exchange", "results"),
    "inference": ("config", "data", "ranks", "exchange", "results", "training"),
    "launch": ("config", "data", "ranks", "results"),
}
WITHOUT_TORCH = ("config",)
HEAD = """# The source

To follow one training, read `training/loop.py` first, then what it calls. Data flows one way: config -> data ->
training (with ranks and exchange) -> results; launch stands beside it. A part imports only the parts that its heading
names, and the single modules. `make source-map` writes this page from the first lines of the files.
"""


def first_line(path: Path) -> str:
    """First line of a file's docstring."""
    return (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0]


def page() -> str:
    """The text of trainer/README.md."""
    lines = [HEAD, "## The single modules", "", *_files(PACKAGE.glob("*.py"))]
    for part, imports in PARTS.items():
        may = f", may import {', '.join(imports)}" if imports else ""
        lines += ["", f"## {part}/{may}", "", first_line(PACKAGE / part / "__init__.py"), ""]
        lines += _files((PACKAGE / part).rglob("*.py"))
    return "\n".join(lines) + "\n"


def _files(paths) -> list[str]:
    shown = [path for path in sorted(paths) if path.name not in ("__init__.py", "__main__.py")]
    return [f"- `{path.relative_to(PACKAGE)}`: {first_line(path)}" for path in shown]


if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.exit((TRAINER / "README.md").read_text() != page() and "trainer/README.md is stale; run make source-map")
    (TRAINER / "README.md").write_text(page())
