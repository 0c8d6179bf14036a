"""Reads what the documents tell people to type, and says what of it does not exist."""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import json
import os
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import jsonschema
import yaml
from runs import REPOSITORY

from k8scifar import cli
from k8scifar.config import loading
from k8scifar.errors import UserError

TESTS = "trainer/tests chart/tests image/tests"  # what `make test` runs
DOCUMENTS = [REPOSITORY / "README.md", *sorted((REPOSITORY / "chart/docs").glob("*.md"))]
DOCUMENTS += [REPOSITORY / name for name in ("chart/README.md", "image/README.md", ".github/CONTRIBUTING.md")]
MAKEFILE = (REPOSITORY / "Makefile").read_text()
TARGETS = set(re.findall(r"^([a-z][a-z-]*):", MAKEFILE, re.M))
PLACES = [REPOSITORY / folder for folder in ("image", "chart/tools", "trainer/tools")]
TOOLS = [path for place in PLACES for path in place.rglob("*.py")]
READ = r"environ(?:\.get\(|\[)\"([A-Z_0-9]+)\""
VARIABLES = set(re.findall(r"\$[({]([A-Z_]+)[)}]|^([A-Z_]+) \?=", MAKEFILE, re.M))
VARIABLES |= {(found,) for path in TOOLS for found in re.findall(r"\"([A-Z][A-Z_]+)\"", path.read_text())}
VARIABLES = {name for pair in VARIABLES for name in pair if name}
# Programs of others that the guides call; a word that is none of these is taken for a slip of the pen.
OTHERS = re.findall(
    r"\S+",
    "apt-get chown cp crictl ctr curl docker drain echo exportfs export firewall-cmd grep helm journalctl k3s kind "
    "kubeadm kubectl ls minikube mkdir mount pre-commit rm sed setpriv sh showmount tee torchrun touch ufw umount cat "
    "/usr/local/bin/k3s-uninstall.sh /usr/local/bin/k3s-agent-uninstall.sh .ci/run image/tools/with-engine.sh nc",
)
ANYTHING = re.compile(r"\.\.\.|\$|<|PATH|ADDRESS|elsewhere")  # a value for the reader to fill in
OURS = ("chart/", "values/", "image/", "trainer/", ".github/", ".ci/")


@dataclass(frozen=True)
class Command:
    """One simple command of a document."""

    where: str
    words: tuple[str, ...]
    environment: tuple[str, ...] = field(default=())

    @property
    def targets(self) -> list[str]:
        """What make is to make; empty for other programs."""
        is_make = self.words[0] in ("make", "gmake")
        return [word for word in self.words[1:] if "=" not in word] if is_make else []


def commands(path: Path) -> Iterator[Command]:
    """The commands of a document: its blocks of shell, and what it quotes in running text."""
    text = path.read_text()
    for block in re.finditer(r"^```(\w*)\n(.*?)^```", text, re.M | re.S):
        if block[1] in ("sh", ""):
            start = text[: block.start()].count("\n") + 2
            lines = re.sub(r"\\\n", "  ", block[2]).splitlines()
            for number, line in enumerate(lines, start):
                yield from split(line, f"{path.name}:{number}")
    prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    for quoted in re.findall(
        r"`((?:make|k8scifar|\.venv/bin/k8scifar|kubectl|helm|sudo|docker|torchrun) [^`]+)`", prose
    ):
        yield from split(" ".join(quoted.split()), f"{path.name}: `{quoted}`")


def split(line: str, where: str = "") -> Iterator[Command]:
    """The simple commands of a line of shell; `<word>` and `$(command)` count as a word, since they stand for one."""
    lexer = shlex.shlex(
        re.sub(r"<(\w+)>", r"\1", re.sub(r"\$\([^)]*\)", "1000", line)), posix=True, punctuation_chars="|&;<>"
    )
    lexer.whitespace_split = True
    words: list[str] = []
    for word in [*lexer, ";"]:
        if word[0] not in "|&;<>":
            words.append(word)
            continue
        if command := _simple(words, where):
            yield command
        words = []


def _simple(words: list[str], where: str) -> Command | None:
    environment = []
    while words and (words[0] in ("sudo", "ssh", "timeout") or re.match(r"[A-Z_0-9]+=", words[0])):
        if "=" in words[0]:
            environment.append(words[0].partition("=")[0])
        words = words[1:] if words[0] not in ("ssh", "timeout") else words[2:]
    return Command(where, tuple(words), tuple(environment)) if words else None


def faults(command: Command) -> list[str]:
    """What is wrong with a command, a line each; empty where all that it names exists."""
    words = list(command.words)
    found = [f"nothing reads the variable {name}" for name in command.environment if name not in _environment()]
    found += [f"there is no file {word}" for word in words if word.startswith(OURS) and not _exists(word)]
    program = words[0]
    if program in ("make", "gmake"):
        found += make_faults(command)
    elif program in ("k8scifar", ".venv/bin/k8scifar"):
        found += trainer_faults(words[1:])
    elif program == "torchrun" and "k8scifar" in words:
        found += trainer_faults(words[words.index("k8scifar") + 1 :])
    elif program == "helm":
        found += chart_faults(words)
    elif program not in OTHERS:
        found.append(f"{program} is no program that is known here")
    return [f"{command.where}: {' '.join(words)}: {fault}" for fault in found]


def make_faults(command: Command) -> list[str]:
    """Targets, variables and the values of some."""
    found = [f"the Makefile has no task {target}" for target in command.targets if target not in TARGETS]
    given = dict(word.split("=", 1) for word in command.words[1:] if "=" in word)
    found += [f"nothing reads {name}=" for name in given if name not in VARIABLES]
    for name in ("TESTS", "VALUES"):
        found += [f"there is no file {path}" for path in given.get(name, "").split() if not _exists(path)]
    if "RECIPE" in given and given["RECIPE"] not in (*loading.recipe_names(), "recipe"):
        found.append(f"there is no recipe {given['RECIPE']}")
    if "HELM_ARGS" in given:
        found += chart_faults(shlex.split(given["HELM_ARGS"]))
    if "ARGS" in given and "test" not in command.targets:
        verb = command.targets[0] if command.targets and command.targets[0] in cli.COMMANDS else "launch"
        if command.targets and command.targets[0] in ("train", "evaluate"):
            found += trainer_faults([verb, *shlex.split(given["ARGS"])])
    if "ARGS" in given and "test" in command.targets:
        found += _selection_faults(shlex.split(given["ARGS"]), given.get("TESTS", TESTS))
    return found


def trainer_faults(words: list[str]) -> list[str]:
    """What `k8scifar` answers to these words, without running the command."""
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told), contextlib.redirect_stdout(told):
            parser, _, _ = cli._parser(words[0] if words else "")
            args = parser.parse_args(words)
            if words[0] in ("train", "launch"):
                loading.from_arguments(args)
    except SystemExit as end:
        return [told.getvalue().strip().splitlines()[-1]] if end.code else []
    except UserError as error:
        return [str(error)]
    return []


def chart_faults(words: list[str]) -> list[str]:
    """Files of values that are missing, and values that the chart's schema does not have."""
    found = []
    for option, value in itertools.pairwise(words):
        if option == "-f" and not _exists(value):
            found.append(f"there is no file {value}")
        if option == "--set":
            for item in re.split(r",(?=[\w.\[\]]+=)", value):
                found += value_faults(*item.partition("=")[::2])
    return found


def value_faults(key: str, value: str) -> list[str]:
    """Whether the chart has this value, and takes it."""
    here = _schema()
    for name, index in re.findall(r"([^.\[\]]+)|\[(\d+)\]", key):
        if here.get("additionalProperties") is True:
            return []
        others = here["additionalProperties"] if isinstance(here.get("additionalProperties"), dict) else None
        here = here.get("items") if index else here.get("properties", {}).get(name, others)
        if here is None:
            return [f"the chart has no value {key}"]
    if ANYTHING.search(value):
        return []
    try:
        jsonschema.validate(yaml.safe_load(value), here)
    except jsonschema.ValidationError as error:
        return [f"{key}: {error.message}"]
    return []


def quoted_settings(path: Path) -> Iterator[tuple[str, str]]:
    """key and value of each `--set key=value` in a document's prose."""
    for quoted in re.findall(r"`--set ([^`]+)`", path.read_text()):
        for item in quoted.split(" --set "):
            if item != "key=value":
                yield item.partition("=")[0], item.partition("=")[2]


def anchors(path: Path) -> set[str]:
    """The names that links to a document's headings have."""
    prose = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.M | re.S)
    titles = re.findall(r"^#+ (.*)$", prose, re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def _exists(name: str) -> bool:
    return (REPOSITORY / name.partition(":")[0]).exists() or bool(ANYTHING.search(name))


def _selection_faults(words: list[str], tests: str) -> list[str]:
    """Options of pytest that pick tests must pick some."""
    found = []
    sources = [path for name in tests.split() for path in _files(REPOSITORY / name)]
    names = " ".join(name for path in sources for name in re.findall(r"def (test_\w+)", path.read_text()))
    for option, value in itertools.pairwise(words):
        if option == "-k":
            picks = re.findall(r"\w+", re.sub(r"\b(or|and|not)\b", "", value))
            found += [f"no test's name has {word}" for word in picks if word not in names]
        if option == "-m" and f'"{value}:' not in (REPOSITORY / "trainer/pyproject.toml").read_text():
            found.append(f"no test is marked {value}")
    return found


def tests() -> list[Path]:
    """The files of tests, wherever they lie."""
    return [path for folder in TESTS.split() for path in _files(REPOSITORY / folder)]


def _files(path: Path) -> list[Path]:
    return sorted(path.rglob("test_*.py")) if path.is_dir() else [path]


@functools.cache
def _schema() -> dict:
    return json.loads((REPOSITORY / "chart/values.schema.json").read_text())


@functools.cache
def _environment() -> set[str]:
    """Environment variables that something here, make or a shell reads."""
    folders = ("trainer/tests", "trainer/src", "trainer/tools", "chart/tools", "chart/tests", "image")
    texts = [path.read_text() for folder in folders for path in (REPOSITORY / folder).rglob("*.py")]
    read = {name for text in texts for name in re.findall(READ, text)}
    return read | VARIABLES | set(os.environ) | {"K3S_URL", "K3S_TOKEN", "KUBECONFIG"}
