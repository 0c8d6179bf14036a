"""Every value of the chart, given in every way Helm knows: the same objects, or one sentence that names the value.

Some hundred values times four ways times two Helms: each test runs them all, several at a time, and lists the faults.
"""

import functools
import hashlib
import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml
from chart_cases import DEFAULTS, case, leaves, put, sections, words
from chart_helpers import CHART, LOADER, container, one, run, trainer

pytestmark = pytest.mark.helm
BASE = {"nfs": {"server": "192.0.2.1"}}
FOUND = json.loads((CHART / "files" / "rules.json").read_text())
RULES = {path: FOUND["types"][name]["sentence"] for path, name in FOUND["texts"].items()}
# A template's fault instead of a sentence.
RAW = re.compile(r"nil pointer|error calling|%!|executing|wrong type|can't evaluate|interface \{\}|panic|e\+0")


class Said:
    """What Helm makes of some values: objects, or its refusal."""

    def __init__(self, done: subprocess.CompletedProcess[str]) -> None:
        self.error = done.stderr if done.returncode else ""
        self.text = done.stdout

    @functools.cached_property
    def objects(self) -> list[dict]:
        """The rendered objects; fails the test if Helm refused."""
        assert not self.error, self.error
        return [item for item in yaml.load_all(self.text, LOADER) if item]

    def same(self, other: "Said") -> bool:
        """Whether both are the same objects, or both a refusal."""
        if self.error or other.error:
            return bool(self.error) == bool(other.error)
        return self.text == other.text or self.objects == other.objects


class Helm:
    """Renders the chart with one major version, from a file of values and options."""

    def __init__(self, major: int, folder: Path, chart: Path = CHART) -> None:
        self.major, self.folder, self.chart = major, folder, chart

    def __call__(self, values: dict, *options: str) -> Said:
        text = json.dumps(values)
        path = self.folder / f"{hashlib.sha256(text.encode()).hexdigest()}.json"
        if not path.exists():
            path.write_text(text)
        return Said(run(f"-f={path}", *options, major=self.major, chart=self.chart))


@pytest.fixture(params=[3, 4])
def template(request, tmp_path) -> Helm:
    return Helm(request.param, tmp_path)


def faults(check: Callable[[str], str], cases: Iterable[str]) -> dict[str, str]:
    """Each case that a check has something to say of, with that."""
    cases = list(cases)
    assert len(cases) > 5
    with ThreadPoolExecutor(4) as pool:
        return {name: words for name, words in zip(cases, pool.map(check, cases), strict=True) if words}


def names(path: str, error: str) -> bool:
    """Whether a refusal names the value: as a.b, or as the schema's /a/b."""
    return any(path.replace(".", mark) in error for mark in "./")


def test_a_value_has_an_effect_and_is_the_same_by_set_by_set_string_and_by_file(template):
    def check(path: str) -> str:
        base, value = case(path)
        whole = json.loads(json.dumps(base))
        put(whole, path, value)
        by_file = template(whole)
        ways = {"--set": list(words(path, value))}
        if isinstance(value, str):
            ways["--set-string"] = ways["--set"]
        for way, given in ways.items():
            other = template(base, *(f"{way}={item}" for item in given))
            if not other.same(by_file):
                return f"{way} is not -f: {other.error or by_file.error or 'other objects'}"
        if by_file.text == template(base).text or "schema" in by_file.error:
            return by_file.error or "the value changes nothing"
        if RAW.search(by_file.error) or RAW.search(by_file.text):
            return by_file.error or "a number in Go's own writing"
        return ""

    assert faults(check, leaves(DEFAULTS)) == {}


# Of the trainer's own configuration, and those that come as fractions or as large numbers.
TRICKY = {
    "user.fsGroup": 2000,
    "user.uid": 1234567,
    "user.gid": 7654321,
    "user.supplementalGroups": [1000000, 7],
    "workload.terminationGracePeriodSeconds": 1000000,
    "rendezvous.waitSeconds": 10000000,
    "dataset.waitSeconds": 2000000,
    "probes.startupSeconds": 1000000,
    "probes.livenessSeconds": 1000000,
    "probes.firstStepSeconds": 1000000,
    "preflight.freeMiB": 1000000,
    "helmTest.timeoutSeconds": 1000000,
    "resources.requests.cpu": 0.5,
    "resources.requests.memory": 8589934592,
    "resources.limits.cpu": 3,
    "tensorboard.resources.requests.cpu": 0.25,
    "initResources.requests.cpu": 1.5,
    "train.seed": 123456789,
    "train.optimizer.lr": 0.05,
    "train.optimizer.weight_decay": 0.00001,
    "train.distributed.timeout_seconds": 60.5,
    "train.checkpoint.every_seconds": 100000,
    "train.resolution": [{"until": 0.5, "pixels": 16}, {"until": 1.0, "pixels": 24}],
    "train.evaluation.interim_images": 1000000,
    "train.name": "123",
    "tolerations": [{"key": "a", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 1000000}],
}


@pytest.mark.parametrize("kind", ["StatefulSet", "Job"])
def test_numbers_are_the_same_in_every_writing(template, kind):
    def check(path: str) -> str:
        base = BASE | {"workload": {"kind": kind}}
        whole = json.loads(json.dumps(base))
        put(whole, path, TRICKY[path])
        by_file = template(whole)
        way = "--set-string" if isinstance(TRICKY[path], str) else "--set"
        by_set = template(base, *(f"{way}={item}" for item in words(path, TRICKY[path])))
        if by_file.error or by_set.error or not by_file.same(by_set):
            return by_file.error or by_set.error or "other objects"
        if by_file.same(template(base)):
            return "it changes nothing"
        return "a number in Go's own writing" if RAW.search(by_file.text) else ""

    assert faults(check, TRICKY) == {}


def test_large_numbers_of_a_job_are_written_out(template):
    values = BASE | {"workload": {"kind": "Job"}}
    values["job"] = {"activeDeadlineSeconds": 1000000, "ttlSecondsAfterFinished": 31536000, "backoffLimit": 1000000}
    spec = one(template(values).objects, "Job")["spec"]
    assert {key: spec[key] for key in values["job"]} == values["job"]
    spec = one(template(values | {"job": {"ttlSecondsAfterFinished": 0}}).objects, "Job")["spec"]
    assert spec["ttlSecondsAfterFinished"] == 0 and "activeDeadlineSeconds" not in spec


def test_a_number_in_another_writing_is_right_or_refused(template):
    """2.0 and 1e0 are numbers in a file and texts for --set; "2" is a text."""
    paths = ("nodes", "rendezvous.port", "user.fsGroup", "train.epochs", "job.backoffLimit")
    base = BASE | {"workload": {"kind": "Job"}}

    def check(name: str) -> str:
        path, writing = name.split(" ")
        file = template.folder / f"{name}.yaml"
        put(tree := {}, path, "VALUE")
        file.write_text(yaml.safe_dump(tree).replace("VALUE", writing))
        right = template(base, f"--set={path}=1000")
        for option in (f"-f={file}", f"--set={path}={writing}", f"--set-string={path}={writing}"):
            said = template(base, option)
            if not said.error and not said.same(right):
                return f"{option} is another number"
            if said.error and (RAW.search(said.error.replace("e+", "")) or path.rpartition(".")[2] not in said.error):
                return said.error
        return ""

    writings = ("1000.0", "1e3", '"1000"', "1000.5", "-1", "9" * 30, "true", "[1000]")
    assert faults(check, [f"{path} {writing}" for path in paths for writing in writings]) == {}


def test_null_is_the_default_for_every_value_and_section(template):
    everything = [*leaves(DEFAULTS), *sections(DEFAULTS)]

    def check(path: str) -> str:
        base, _ = case(path)
        # Null takes a key out of a map of the user's own: see the next test.
        own = re.search(r"esources\.(limits|requests)", path)
        whole = json.loads(json.dumps(base))
        default = template(whole)
        put(whole, path, None)
        # Each way is tried with one of the two Helms, in turn.
        by_set = (len(path) + (template.major == 3)) % 2
        said = template(base, f"--set={path}=null") if by_set else template(whole)
        if said.error and (RAW.search(said.error) or not (names(path, said.error) or "nfs.server" in said.error)):
            return said.error
        # Where the values beside it were in its section, they went with it.
        if not (said.error or own or said.same(default) or said.same(template(BASE))):
            return "neither the default nor a refusal"
        return ""

    assert faults(check, everything) == {}


def test_null_takes_a_limit_away(template):
    said = template(BASE, "--set=resources.limits.memory=null,tensorboard.resources.limits=null")
    assert not container(trainer(said.objects))["resources"].get("limits")
    (board,) = one(said.objects, "Deployment")["spec"]["template"]["spec"]["containers"]
    assert set(board["resources"]) == {"requests"}
    assert container(trainer(said.objects), "prepare")["resources"]["limits"] == {"memory": "2Gi"}


def test_values_of_an_older_chart_lack_keys_and_the_defaults_hold(tmp_path, template):
    """`helm upgrade --reuse-values` puts the older chart's defaults in the place of this one's."""
    shutil.copytree(CHART, tmp_path / "chart")
    (tmp_path / "chart" / "values.yaml").write_text("nodes: 2\ntensorboard: {ingress: {}}\n")
    older = Helm(template.major, tmp_path, tmp_path / "chart")
    assert older(BASE).objects == template(BASE).objects


def test_the_chart_may_be_part_of_another(tmp_path, template):
    parent = tmp_path / "parent"
    shutil.copytree(CHART, parent / "charts" / "k8scifar")
    (parent / "Chart.yaml").write_text("apiVersion: v2\nname: parent\nversion: 0.1.0\n")
    said = Helm(template.major, tmp_path, parent)({"k8scifar": BASE, "global": {"a": 1}})
    assert said.error == ""
    assert said.objects == template(BASE).objects


def place(path: str, bad: str) -> tuple[dict, str]:
    """Values with a text at a rule's path, and how a refusal names it."""
    parts, tree = path.split("."), bad
    for part in reversed(parts):
        if part == "[]":
            tree = [tree | {"mountPath": "/x"} if path == "extraVolumeMounts.[].name" else tree]
        elif part == "{}":
            tree = {"key": tree} if "esources" not in path else {"cpu": tree}
        elif part == "{key}":
            tree = {bad: "x"} if "esources" not in path else {bad: "1"}
        else:
            tree = {part: tree}
    if path == "extraVolumeMounts.[].mountPath":
        tree["extraVolumeMounts"][0]["name"] = "v"
    return tree, re.split(r"\.?(\[\]|\{)", path)[0]


def test_every_text_that_becomes_part_of_an_object_has_a_rule_and_a_sentence(template):
    def check(path: str) -> str:
        bad = " surrounded " if len(path) % 2 else "line\nbreak"
        tree, name = place(path, bad)
        said = template(tree | {"nfs": BASE["nfs"] | tree.get("nfs", {})})
        if not said.error:
            return f"{bad!r} is taken"
        fits = name in said.error and RULES[path] in said.error and not RAW.search(said.error)
        return "" if fits else said.error

    assert len(RULES) > 50
    assert faults(check, RULES) == {}
