"""Writes the chart's generated files: `values.schema.json`, `files/recipes.yaml`, `files/rules.yaml`, README's table.

    python chart/tools/chart_files.py schema|docs [--check]

With `--check` nothing is written, and the exit code is 1 where a file is not what it would be.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).parent))
from chart_values import Values
from k8scifar.config import loading
from k8scifar.config.schema import Config
from value_types import TRAINER_RULES

CHART = Path(__file__).resolve().parents[1]
# Keys of the trainer that the chart sets itself.
TAKEN = ("data.dir", "runs_dir", "distributed.world_size", "distributed.storage")
# Keys of a recipe that the templates check against the number of ranks.
NEEDED = ("epochs", "global_batch", "micro_batch")
# Kubernetes' own maps, which the table shows whole.
FREE = ("resources", "initResources", "tensorboard.resources")


def comments(text: str) -> dict[str, str]:
    """Comment of each key of a YAML text, `a.b` -> words; the lines right above the key."""
    found: dict[str, str] = {}
    path: list[tuple[int, str]] = []
    lines: list[str] = []
    for line in text.splitlines():
        indent = len(line) - len(line.lstrip())
        if line.strip().startswith("#"):
            lines.append(line.strip().lstrip("# ").rstrip())
        elif match := re.match(r"^ *([A-Za-z_]\w*):", line):
            path = [*((depth, key) for depth, key in path if depth < indent), (indent, match[1])]
            if lines:
                found[".".join(key for _, key in path)] = " ".join(lines)
            lines = []
        else:
            lines = []
    return found


def schema() -> dict[str, Any]:
    """The closed JSON schema (draft 7, which every Helm reads) of the chart's values."""
    values = _values_schema()
    described = comments((CHART / "values.yaml").read_text())
    _describe(values, described)
    return {"$schema": "http://json-schema.org/draft-07/schema#"} | _bare(values) | {"title": "Values of the chart"}


def _values_schema() -> dict[str, Any]:
    values = _inline(Values.model_json_schema())
    values["properties"]["train"] = _train_schema()
    return values


def _train_schema() -> dict[str, Any]:
    train = _inline(Config.model_json_schema())
    for path in TAKEN:
        section, last = _section(train, path)
        del section[last]
    for path, rule in TRAINER_RULES.items():
        section, last = _section(train, path)
        section[last].pop("pattern", None)
        section[last]["x-rule"] = rule
    return _accept_numbers_as_text(train)


def _section(schema: dict[str, Any], path: str) -> tuple[dict[str, Any], str]:
    """The properties among which a dotted path ends, and its last key."""
    *parents, last = path.split(".")
    for parent in parents:
        schema = schema["properties"][parent]
    return schema["properties"], last


def _accept_numbers_as_text(node: Any) -> Any:
    """Let a fraction be text too: Helm makes text of `--set a=0.1`, and the trainer reads it as a number."""
    if isinstance(node, list):
        return [_accept_numbers_as_text(item) for item in node]
    if not isinstance(node, dict):
        return node
    if node.get("type") == "number":
        limits = {key: node[key] for key in node if key not in ("description", "title", "default")}
        text = {"type": "string", "pattern": r"^[0-9]+(\.[0-9]*)?([eE][-+]?[0-9]+)?$"}
        return {key: node[key] for key in node if key not in limits} | {"anyOf": [limits, text]}
    return {key: _accept_numbers_as_text(value) for key, value in node.items()}


def _inline(whole: dict[str, Any]) -> dict[str, Any]:
    """The schema without references: Helm 3 and 4 resolve those in different ways."""
    definitions = whole.get("$defs", {})

    def walk(node: Any) -> Any:
        if isinstance(node, list):
            return [walk(item) for item in node]
        if not isinstance(node, dict):
            return node
        if "$ref" in node:
            rest = {key: value for key, value in node.items() if key != "$ref"}
            return walk(definitions[node["$ref"].rpartition("/")[2]] | rest)
        return {key: walk(value) for key, value in node.items() if key != "$defs"}

    return walk(whole)


def _describe(node: dict[str, Any], described: dict[str, str], path: str = "") -> None:
    for key, child in node.get("properties", {}).items():
        full = f"{path}{key}"
        if full in described:
            child["description"] = described[full]
        _describe(child, described, f"{full}.")


def _bare(node: Any, is_properties: bool = False) -> Any:
    """Without the titles that pydantic makes up, and without what a partial file of values need not have."""
    if isinstance(node, list):
        return [_bare(item) for item in node]
    if not isinstance(node, dict):
        return node
    drop = () if is_properties else ("title", "required", "default", "x-rule", "propertyNames")
    kept = {key: value for key, value in node.items() if key not in drop}
    bare = {key: _bare(value, is_properties=key == "properties" and not is_properties) for key, value in kept.items()}
    # The items of a list are whole objects, so that there a name is still required.
    if not is_properties and isinstance(node.get("items"), dict) and node["items"].get("required"):
        bare["items"]["required"] = node["items"]["required"]
    return bare


def rules() -> str:
    """What the templates must know of the values, as YAML: defaults, patterns of texts, limits of fractions."""
    values = _values_schema()
    found = dict(_marked(values, lambda node: node.get("x-rule")))
    numbers = dict(_marked(values["properties"]["train"], _limits))
    facts = {
        "defaults": yaml.safe_load((CHART / "values.yaml").read_text()),
        # Maps of the user's own keys: null takes one away, and the default does not come back.
        "free": list(FREE),
        "rules": found,
        "numbers": numbers,
    }
    return "# Generated by `make schema` from values.yaml and its types.\n" + yaml.safe_dump(
        facts, sort_keys=False, width=1000
    )


def _limits(node: dict[str, Any]) -> dict[str, Any] | None:
    """The limits of a fraction that may be text, too."""
    number = next((each for each in node.get("anyOf", []) if each.get("type") == "number"), None)
    text = any(each.get("type") == "string" for each in node.get("anyOf", []))
    return {key: limit for key, limit in number.items() if key != "type"} if number and text else None


def _marked(node: dict[str, Any], mark: Callable[[dict[str, Any]], Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Path and mark of each marked node; `[]` are a list's items, `{}` a map's values, `{key}` its keys."""
    if (found := mark(node)) is not None:
        yield path, found
        return
    start = f"{path}." if path else ""
    for key, child in node.get("properties", {}).items():
        yield from _marked(child, mark, f"{start}{key}")
    for key, step in (("items", "[]"), ("additionalProperties", "{}"), ("propertyNames", "{key}")):
        if isinstance(node.get(key), dict):
            yield from _marked(node[key], mark, f"{start}{step}")
    for child in node.get("anyOf", []):
        yield from _marked(child, mark, path)


def recipes() -> str:
    """What the templates must know of each recipe, as YAML."""
    table = {
        name: {key: loading.load(None, (), name).model_dump()[key] for key in NEEDED} for name in loading.recipe_names()
    }
    return "# Generated by `make schema` from the trainer's recipes.\n" + yaml.safe_dump(table, sort_keys=False)


def table() -> str:
    """The README's table: every value, its default and its comment."""
    text = (CHART / "values.yaml").read_text()
    described = comments(text)
    rows = ["| Value | Default | Meaning |", "|---|---|---|"]

    def walk(node: dict[str, Any], path: str = "") -> None:
        for key, value in node.items():
            full = f"{path}{key}"
            whole = full in FREE
            if isinstance(value, dict) and value and not whole:
                walk(value, f"{full}.")
            else:
                meaning = described.get(full, "").replace("|", "\\|")
                rows.append(f"| `{full}` | `{json.dumps(value)}` | {meaning} |")

    walk(yaml.safe_load(text))
    return "\n".join(rows)


def readme() -> str:
    """The chart's README with its table renewed."""
    path = CHART / "README.md"
    begin, end = "<!-- values: generated by `make chart-docs` -->", "<!-- end of values -->"
    before, found, rest = path.read_text().partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise SystemExit(f"error: {path} has lost the markers {begin} and {end}")
    return f"{before}{begin}\n{table()}\n{end}{after}"


def outputs(what: str) -> dict[Path, str]:
    """Each generated file and what it should hold."""
    if what == "docs":
        return {CHART / "README.md": readme()}
    return {
        CHART / "values.schema.json": json.dumps(schema(), indent=1) + "\n",
        CHART / "files" / "recipes.yaml": recipes(),
        CHART / "files" / "rules.yaml": rules(),
    }


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("schema", "docs"))
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args(arguments)
    stale = 0
    for path, text in outputs(args.what).items():
        if path.exists() and path.read_text() == text:
            continue
        if args.check:
            print(f"error: {path} is stale; run `make schema chart-docs`", file=sys.stderr)
            stale = 1
        else:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
            print(f"wrote {path}")
    return stale


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
