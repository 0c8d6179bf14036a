"""Write the chart's generated files: `values.schema.json`, `files/rules.json` and the table in README.md.

    python chart/tools/chart_files.py schema|docs [--check]

All come from values.yaml (defaults, comments, types) and values.types.yaml; what `train` takes comes from the trainer.
With `--check` nothing is written, and the exit code is 1 if a file is stale.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from k8scifar.config import loading
from k8scifar.config.schema import Config

sys.path.insert(0, str(Path(__file__).parent))
from value_types import Schema, Types

CHART = Path(__file__).resolve().parents[1]
# Keys of the trainer that the chart sets itself.
CHART_SETS = ("data.dir", "runs_dir", "distributed.world_size", "distributed.storage")
# Keys of a recipe that the templates check against the number of ranks.
CHECKED = ("epochs", "global_batch", "micro_batch")
# A fraction as text: Helm makes text of `--set a=0.1`.
FRACTION = {"type": "string", "pattern": r"^[0-9]+(\.[0-9]*)?([eE][-+]?[0-9]+)?$"}


class Key(NamedTuple):
    """What values.yaml writes beside a key."""

    comment: str
    type: str


def keys(text: str) -> dict[str, Key]:
    """The comment above each key of a YAML text, and the type behind it, by dotted path."""
    found: dict[str, Key] = {}
    path: list[tuple[int, str]] = []
    comment: list[str] = []
    for line in text.splitlines():
        indent = len(line) - len(line.lstrip())
        if line.strip().startswith("#"):
            comment.append(line.strip().lstrip("# ").rstrip())
            continue
        if match := re.match(r"^ *([A-Za-z_]\w*):(?:.* # type: (.+))?", line):
            path = [*((depth, key) for depth, key in path if depth < indent), (indent, match[1])]
            found[".".join(key for _, key in path)] = Key(" ".join(comment), match[2] or "")
        comment = []
    return found


class Values:
    """The values of the chart."""

    def __init__(self) -> None:
        text = (CHART / "values.yaml").read_text()
        self.defaults, self.keys = yaml.safe_load(text), keys(text)
        self.types = Types(CHART / "values.types.yaml")
        self.schema = self._section(self.defaults, "")
        # Helm gives it to a chart that is a part of another chart.
        self.schema["properties"]["global"] = self.types.schema("object")

    def is_section(self, path: str, value: Any) -> bool:
        """Whether a key holds other keys of the chart; a map with a type holds the user's."""
        return isinstance(value, dict) and not self.keys[path].type

    def leaves(self, node: dict[str, Any] | None = None, above: str = "") -> Iterator[tuple[str, Any]]:
        """Path and default of each value."""
        for key, value in (self.defaults if node is None else node).items():
            if self.is_section(above + key, value):
                yield from self.leaves(value, f"{above}{key}.")
            else:
                yield above + key, value

    def _section(self, node: dict[str, Any], above: str) -> Schema:
        return {
            "type": "object",
            "additionalProperties": False,
            "properties": {key: self._value(above + key, value) for key, value in node.items()},
        }

    def _value(self, path: str, default: Any) -> Schema:
        key = self.keys[path]
        if path == "train":
            found = train_schema(self.types)
            self._describe(found, "train.")
        elif self.is_section(path, default):
            found = self._section(default, f"{path}.")
        elif isinstance(default, bool):
            found = self.types.schema("boolean")
        elif key.type:
            found = self.types.schema(key.type)
        else:
            raise SystemExit(f"error: {path} has no type in values.yaml")
        return found | ({"description": key.comment} if key.comment else {})

    def _describe(self, node: Schema, above: str) -> None:
        """Replace the trainer's descriptions by the chart's."""
        for key, child in node.get("properties", {}).items():
            if words := self.keys.get(above + key, Key("", "")).comment:
                child["description"] = words
            self._describe(child, f"{above}{key}.")


def train_schema(types: Types) -> Schema:
    """The schema of `train`: the trainer's own, less what the chart sets."""
    whole = Config.model_json_schema()
    train = _plain(whole, whole["$defs"])
    for path in CHART_SETS:
        section, last = _section_of(train, path)
        del section[last]
    for path, name in types.train.items():
        section, last = _section_of(train, path)
        section[last].pop("pattern", None)
        section[last]["x-text"] = name
    return train


def _section_of(schema: Schema, path: str) -> tuple[Schema, str]:
    """The properties among which a dotted path ends, and its last key."""
    *parents, last = path.split(".")
    for parent in parents:
        schema = schema["properties"][parent]
    return schema["properties"], last


def _plain(node: Schema, definitions: dict[str, Schema], is_item: bool = False) -> Schema:
    """A schema of pydantic's without references, which Helm 3 and 4 resolve in different ways, titles and defaults.

    A file of values need not be whole, so that only a list's items require keys.
    """
    if "$ref" in node:
        node = definitions[node["$ref"].rpartition("/")[2]] | {key: node[key] for key in node if key != "$ref"}
    if node.get("type") == "number":
        about = {key: node[key] for key in ("description",) if key in node}
        limits = {key: node[key] for key in node if key not in ("description", "title", "default")}
        return about | {"anyOf": [limits, FRACTION]}
    dropped = ("title", "default", "$defs") if is_item else ("title", "default", "$defs", "required")
    kept = {key: value for key, value in node.items() if key not in dropped}
    if "properties" in kept:
        kept["properties"] = {key: _plain(child, definitions) for key, child in kept["properties"].items()}
    for key in ("items", "additionalProperties"):
        if isinstance(kept.get(key), dict):
            kept[key] = _plain(kept[key], definitions, is_item=key == "items")
    if "anyOf" in kept:
        kept["anyOf"] = [_plain(child, definitions) for child in kept["anyOf"]]
    return kept


def found_in(node: Schema, mark: Callable[[Schema], Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Path and mark of each marked node; `[]` are a list's items, `{}` a map's values, `{key}` its keys."""
    if (found := mark(node)) is not None:
        yield path, found
        return
    start = f"{path}." if path else ""
    for key, child in node.get("properties", {}).items():
        yield from found_in(child, mark, f"{start}{key}")
    for key, step in (("items", "[]"), ("additionalProperties", "{}"), ("propertyNames", "{key}")):
        if isinstance(node.get(key), dict):
            yield from found_in(node[key], mark, f"{start}{step}")
    for child in node.get("anyOf", []):
        yield from found_in(child, mark, path)


def _limits(node: Schema) -> Schema | None:
    """The limits of a fraction that may be text, too."""
    if FRACTION not in node.get("anyOf", []):
        return None
    return {key: limit for key, limit in node["anyOf"][0].items() if key != "type"}


def rules(values: Values) -> dict[str, dict[str, Any]]:
    """What the templates need to know of the values."""
    recipes = {name: loading.load(None, (), name).model_dump() for name in loading.recipe_names()}
    return {
        "defaults": values.defaults,
        # In these maps null takes a key away; in all others it means the default.
        "maps": {path: True for path, value in values.leaves() if isinstance(value, dict) and value},
        "texts": dict(found_in(values.schema, lambda node: node.get("x-text"))),
        "types": values.types.texts,
        "numbers": dict(found_in(values.schema["properties"]["train"], _limits)),
        "recipes": {name: {key: recipe[key] for key in CHECKED} for name, recipe in recipes.items()},
    }


def lines(sections: dict[str, dict[str, Any]]) -> str:
    """JSON with a line for each entry of a section."""
    found = [
        f'"{name}": {{\n' + ",\n".join(f'  "{key}": {json.dumps(value)}' for key, value in section.items()) + "\n}"
        for name, section in sections.items()
    ]
    return "{\n" + ",\n".join(found) + "\n}\n"


def for_helm(node: Any) -> Any:
    """A schema without what only the templates check."""
    if isinstance(node, list):
        return [for_helm(child) for child in node]
    if not isinstance(node, dict):
        return node
    return {key: for_helm(child) for key, child in node.items() if key not in ("x-text", "propertyNames")}


def table(values: Values) -> str:
    """The README's table: every value, its default and its comment."""
    rows = ["| Value | Default | Meaning |", "|---|---|---|"]
    for path, default in values.leaves():
        meaning = values.keys[path].comment.replace("|", "\\|")
        rows.append(f"| `{path}` | `{json.dumps(default)}` | {meaning} |")
    return "\n".join(rows)


def readme(values: Values) -> str:
    """The chart's README with a new table."""
    path = CHART / "README.md"
    begin, end = "<!-- values: generated by `make chart-docs` -->", "<!-- end of values -->"
    before, found, rest = path.read_text().partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise SystemExit(f"error: {path} has lost the markers {begin} and {end}")
    return f"{before}{begin}\n{table(values)}\n{end}{after}"


def outputs(what: str) -> dict[Path, str]:
    """Each generated file and what it should hold."""
    values = Values()
    if what == "docs":
        return {CHART / "README.md": readme(values)}
    head = {"$schema": "http://json-schema.org/draft-07/schema#", "title": "Values of the chart"}
    return {
        CHART / "values.schema.json": json.dumps(head | for_helm(values.schema), indent=1) + "\n",
        CHART / "files" / "rules.json": lines(rules(values)),
    }


def main(arguments: list[str]) -> int:
    """Run the command line."""
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
            path.write_text(text)
            print(f"wrote {path}")
    return stale


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
