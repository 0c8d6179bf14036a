"""Load a configuration: defaults < recipe < the user's YAML < ``--set`` < the command line's folders.

This module does not import torch, so that a mistake is reported at once.
"""

from __future__ import annotations

import argparse
import difflib
import json
import sys
from collections.abc import Collection, Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from k8scifar.config.schema import DEFAULT_RECIPE, Config, flatten
from k8scifar.errors import UserError

# Keys of earlier releases, with the value that had no effect: a config.yaml with that value still loads.
REMOVED: dict[tuple[str, ...], Any] = {
    ("ema",): {"decay": 0.0}, ("distributed", "powersgd_rank"): 4, ("data", "source"): "auto",
}  # fmt: skip


def add_arguments(parser: argparse._ActionsContainer) -> None:
    """Add the options from which a configuration is loaded."""
    parser.add_argument("--recipe", metavar="NAME", help=f"recipe with the default values: {', '.join(recipe_names())}")
    parser.add_argument("--config", metavar="FILE", help="YAML file whose values replace the recipe's")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="sets", help="one value, repeatable"
    )
    parser.add_argument("--data-dir", metavar="DIR", help="folder of the packed data set (data.dir)")
    parser.add_argument("--runs-dir", metavar="DIR", help="folder of the run folders (runs_dir)")
    parser.add_argument("--name", metavar="NAME", help="name of the run, and of its folder (name)")


def from_arguments(args: argparse.Namespace) -> Config:
    """The configuration of a command line. Raises UserError."""
    named = {"data.dir": args.data_dir, "runs_dir": args.runs_dir, "name": args.name}
    sets = [f"{key}={json.dumps(value)}" for key, value in named.items() if value is not None]
    return load(args.config, [*args.sets, *sets], args.recipe)


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Command line of `k8scifar config`."""
    add_arguments(parser)
    parser.add_argument("--schema", action="store_true", help="print the JSON schema of the configuration instead")


def run_config(args: argparse.Namespace) -> int:
    """`k8scifar config`."""
    if args.schema:
        given = (args.recipe, args.config, args.data_dir, args.runs_dir, args.name, *args.sets)
        if any(value is not None for value in given):
            raise UserError("--schema is the same for all values; leave the other options out")
        json.dump(Config.model_json_schema(), sys.stdout, indent=2)
        print()
    else:
        sys.stdout.write(from_arguments(args).to_yaml())
    return 0


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Merge `over` into a copy of `base`, mapping by mapping; lists are replaced."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def recipe_names() -> list[str]:
    """Names of the recipes in the package."""
    folder = resources.files("k8scifar.config") / "recipes"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def recipe(name: str) -> dict[str, Any]:
    """The values of one recipe. Raises UserError if it does not exist."""
    if name not in recipe_names():
        raise UserError(f"recipe {name!r} is unknown{_did_you_mean(name, recipe_names())}")
    return yaml.safe_load((resources.files("k8scifar.config") / "recipes" / f"{name}.yaml").read_text()) or {}


def load(path: str | Path | None = None, sets: Iterable[str] = (), recipe_name: str | None = None) -> Config:
    """Resolve the configuration: defaults < recipe < the YAML file at `path` < `sets` ("key=value").

    Raises UserError with a clause for each mistake: the key's path and the nearest valid name.
    """
    user = _read_yaml(path) if path else {}
    for item in sets:
        user = merge(user, _parse_set(item))
    chosen = recipe_name or user.get("recipe") or DEFAULT_RECIPE
    return validate(merge(merge(recipe(str(chosen)), user), {"recipe": str(chosen)}))


def check_read(sets: Iterable[str], read: Collection[str], command: str) -> None:
    """Raise UserError if one of `sets` ("key=value") is a key that this command does not read."""
    for key in (key for item in sets for key in flatten(_parse_set(item))):
        if key not in read:
            raise UserError(f"`k8scifar {command}` does not read {key}; leave it out: it reads {', '.join(read)}")


def validate(values: Mapping[str, Any]) -> Config:
    """The typed configuration of these values. Raises UserError."""
    values = _without_removed(values)
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise UserError("configuration: " + "; ".join(_explain(item) for item in error.errors())) from None


def _without_removed(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values without keys of earlier releases. Raises UserError if such a key had an effect there."""
    kept = dict(values)
    for (*sections, key), idle in REMOVED.items():
        place = kept
        for section in sections:
            if not isinstance(place.get(section), Mapping):
                break
            place[section] = place = dict(place[section])
        else:
            if key in place and place.pop(key) not in (idle, {}, None):
                raise UserError(f"configuration: {'.'.join([*sections, key])} is no longer there; leave it out")
    return kept


def _read_yaml(path: str | Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise UserError(f"configuration file {path}: {error.strerror or error}; check the path") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"configuration file {path} is not YAML: {' '.join(str(error).split())}") from None
    if values is not None and not isinstance(values, dict):
        raise UserError(f"configuration file {path} must hold `key: value` lines, not a {type(values).__name__}")
    return values or {}


def _parse_set(item: str) -> dict[str, Any]:
    key, equals, text = item.partition("=")
    if not equals or not all(key.split(".")):
        raise UserError(f"--set {item!r}: write key=value, for example --set optimizer.lr=0.1")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"--set {item!r}: the value is not YAML; quote it") from None
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def _explain(error: Mapping[str, Any]) -> str:
    """One validation error as a clause: the key's path, the problem, the correct form."""
    path = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"unknown key {path!r}{_did_you_mean(path, list(_all_keys(Config)))}"
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    given = repr(error["input"]) if not isinstance(error["input"], dict) else "a mapping"
    return f"{path} = {given}: {error['msg'][0].lower()}{error['msg'][1:]}"


def _all_keys(section: type[BaseModel], prefix: str = "") -> Iterable[str]:
    for name, field in section.model_fields.items():
        yield prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _all_keys(field.annotation, f"{prefix}{name}.")


def _did_you_mean(name: str, valid: list[str]) -> str:
    same_leaf = [key for key in valid if key.split(".")[-1] == name.split(".")[-1]]
    near = same_leaf or difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    if near:
        return f"; did you mean {near[0]!r}?"
    top = [key for key in valid if "." not in key]
    return f"; valid names: {', '.join(top)}"
