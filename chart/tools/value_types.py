"""Make JSON schemas of the types in chart/values.types.yaml."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

Schema = dict[str, Any]
BASIC: dict[str, Schema] = {
    "integer": {"type": "integer"},
    "number": {"type": "number", "minimum": 0},
    "string": {"type": "string"},
    "boolean": {"type": "boolean"},
    "null": {"type": "null"},
    "object": {"type": "object", "additionalProperties": True},
    "any": {},
}


class Types:
    """The named types; `texts` has the whole pattern and the sentence of each type of text."""

    def __init__(self, path: Path) -> None:
        found = yaml.safe_load(path.read_text())
        self.short, self.objects, self.train = found["types"], found["objects"], found["train"]
        self.texts = {
            name: {"pattern": f"^({_inserted(text['pattern'], found['parts'])})$", "sentence": text["sentence"]}
            for name, text in found["texts"].items()
        }

    def schema(self, name: str) -> Schema:
        """The JSON schema of a type. `x-text` names the type of a text, for the templates."""
        if name in BASIC:
            return dict(BASIC[name])
        if name in self.texts:
            return {"type": "string", "x-text": name}
        if name in self.short:
            return self.schema(self.short[name])
        if name in self.objects:
            return self._object(self.objects[name])
        return self._composed(name)

    def _composed(self, name: str) -> Schema:
        if limits := re.fullmatch(r"(\d+)\.\.(\d+)", name):
            return {"type": "integer", "minimum": int(limits[1]), "maximum": int(limits[2])}
        if " | " in name:
            return {"type": "string", "enum": [word.strip('"') for word in name.split(" | ")]}
        if name.startswith("list of "):
            return {"type": "array", "items": self.schema(name.removeprefix("list of "))}
        if entry := re.fullmatch(r"map of (.+?) to (.+)", name):
            keys = {} if entry[1] == "string" else {"propertyNames": self.schema(entry[1])}
            return {"type": "object", "additionalProperties": self.schema(entry[2])} | keys
        if choice := re.fullmatch(r"(.+?) or (.+)", name):
            return {"anyOf": [self.schema(choice[1]), self.schema(choice[2])]}
        raise SystemExit(f"error: there is no type {name!r} in values.types.yaml")

    def _object(self, keys: dict[str, str]) -> Schema:
        found: Schema = {"type": "object", "additionalProperties": "others" in keys, "properties": {}}
        for key, name in keys.items():
            if key != "others":
                found["properties"][key.rstrip("*")] = self.schema(name)
        required = [key.rstrip("*") for key in keys if key.endswith("*")]
        return found | ({"required": required} if required else {})


def _inserted(pattern: str, parts: dict[str, str]) -> str:
    """A pattern with the parts that it names in angle brackets."""
    return re.sub(r"<(\w+)>", lambda part: _inserted(parts[part[1]], parts), pattern)
