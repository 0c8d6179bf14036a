"""The workflows are whole: their schema, their actions' commits, their rights, and what they run exists."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import documents
import pytest
import yaml
from chart_helpers import CHART, render
from runs import REPOSITORY

import k8scifar

GITHUB = REPOSITORY / ".github"
WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yml"))
FORMS = sorted(path for path in (GITHUB / "ISSUE_TEMPLATE").glob("*.yml") if path.name != "config.yml")


def check(schema: str, *files: Path) -> subprocess.CompletedProcess:
    """`check-jsonschema` with one of the schemas that it brings."""
    program = Path(sys.executable).parent / "check-jsonschema"
    command = [str(program), "--builtin-schema", schema, *map(str, files)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def jobs() -> list[tuple[str, dict]]:
    """Name and content of every job of every workflow."""
    parsed = [(path.stem, yaml.safe_load(path.read_text())) for path in WORKFLOWS]
    return [(f"{stem}.{name}", job) for stem, workflow in parsed for name, job in workflow["jobs"].items()]


def steps() -> list[tuple[str, dict]]:
    """Every step, under its job's name."""
    return [(name, step) for name, job in jobs() for step in job.get("steps", [])]


def scripts() -> list[tuple[str, str]]:
    """Every `run` block, GitHub's expressions replaced by a word."""
    return [(name, re.sub(r"\$\{\{.*?\}\}", "WORD", step["run"])) for name, step in steps() if "run" in step]


@pytest.mark.parametrize("schema", ["vendor.github-workflows", "custom.github-workflows-require-timeout"])
def test_workflows_fit_githubs_schema(schema, tmp_path):
    done = check(schema, *WORKFLOWS)
    assert done.returncode == 0, done.stdout + done.stderr
    broken = tmp_path / "broken.yml"
    text = WORKFLOWS[0].read_text().replace("timeout-minutes:", "time-out-minutes:")
    broken.write_text(text)
    assert check(schema, broken).returncode != 0


def test_issue_forms_fit_githubs_schema():
    assert check("vendor.github-issue-forms", *FORMS).returncode == 0
    assert check("vendor.github-issue-config", GITHUB / "ISSUE_TEMPLATE" / "config.yml").returncode == 0
    assert "make diagnose" in (GITHUB / "ISSUE_TEMPLATE" / "bug.yml").read_text()


def test_every_action_is_pinned_by_commit_and_named_by_version():
    lines = [line.strip() for path in WORKFLOWS for line in path.read_text().splitlines() if "uses:" in line]
    pins: dict[str, set[str]] = {}
    for line in lines:
        used = line.partition("uses:")[2].strip()
        if used.startswith("./"):
            assert (REPOSITORY / used).exists()
            continue
        found = re.fullmatch(r"([\w-]+/[\w/-]+)@([0-9a-f]{40}) # v\d+\.\d+\.\d+", used)
        assert found, line
        pins.setdefault(found[1], set()).add(found[2])
    assert pins
    assert [name for name, commits in pins.items() if len(commits) > 1] == []


def test_rights_are_few():
    for path in WORKFLOWS:
        workflow = yaml.safe_load(path.read_text())
        assert workflow["permissions"] == {"contents": "read"}
        assert "concurrency" in workflow
    writing = {name: job["permissions"] for name, job in jobs() if "write" in job.get("permissions", {}).values()}
    assert sorted(writing) == ["release.image", "release.publish"]
    for name, step in steps():
        if "checkout" in step.get("uses", ""):
            assert step["with"]["persist-credentials"] is False, name


def test_nothing_from_outside_is_pasted_into_a_script():
    """Titles, branch names and the like reach a script by its environment, where they can't become commands."""
    for name, step in steps():
        assert re.findall(r"\$\{\{.*?\}\}", step.get("run", "")) == [], name


def test_every_task_and_file_that_a_workflow_names_exists():
    named = []
    for name, script in scripts():
        for line in script.replace("\\\n", " ").splitlines():
            for told in re.findall(r"g?make [^|&;()]*", re.sub(r"\$\([^)]*\)", "1000", line)):
                if told.split()[1].startswith(("bash", "-")):  # brew install make bash
                    continue
                named += [(name, command) for command in documents.split(told, name)]
        files = re.findall(r"(?<![\w/.-])(?:chart|values|image|trainer|\.github|\.ci)/[\w./-]+", script)
        assert [file for file in files if not (REPOSITORY / file).exists() and "docs/tensorboard" not in file] == []
    assert len(named) > 15
    assert [fault for _, command in named for fault in documents.faults(command)] == []


@pytest.mark.parametrize("name, script", scripts())
def test_scripts_pass_shellcheck(name, script):
    program = shutil.which("shellcheck") or Path(sys.executable).parent / "shellcheck"
    command = [str(program), "--shell=bash", "--severity=warning", "-"]
    done = subprocess.run(command, input=script, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, f"{name}\n{done.stdout}"


def test_the_cluster_test_spans_what_the_chart_supports():
    oldest = yaml.safe_load((CHART / "Chart.yaml").read_text())["kubeVersion"]
    minors = re.findall(r"range\(27, (\d+)\)", (REPOSITORY / "chart/tests/test_chart_render.py").read_text())
    cluster = dict(jobs())["cluster.kind"]
    rows = cluster["strategy"]["matrix"]["include"]
    assert [row["helm"] for row in rows] == [3, 4]
    assert f">={rows[0]['kubernetes']}.0-0" == oldest
    assert rows[-1]["kubernetes"] == f"1.{int(minors[0]) - 1}"
    for row in rows:
        assert re.fullmatch(rf"kindest/node:v{row['kubernetes']}\.\d+@sha256:[0-9a-f]{{64}}", row["node"])


@pytest.mark.helm
def test_the_cluster_tests_values_render_two_pods_that_share_a_folder():
    objects = render("kind.yaml", "-f", str(GITHUB / "e2e-values.yaml"), "--set=user.uid=1001,user.gid=1001")
    kinds = [item["kind"] for item in objects]
    assert kinds.count("PersistentVolume") == 2
    workload = next(item for item in objects if item["kind"] == "StatefulSet")
    assert workload["spec"]["replicas"] == 2
    nodes = yaml.safe_load((CHART / "docs" / "kind-cluster.yaml").read_text())["nodes"]
    mounts = [node["extraMounts"][0] for node in nodes if node["role"] == "worker"]
    volumes = {item["spec"]["hostPath"]["path"] for item in objects if item["kind"] == "PersistentVolume"}
    assert len(mounts) == 2
    assert volumes == {mount["containerPath"] for mount in mounts}


def test_the_changelog_knows_this_version_and_the_chart_agrees():
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert k8scifar.__version__ == chart["version"] == chart["appVersion"]
    place = importlib.util.spec_from_file_location("release_notes", GITHUB / "release_notes.py")
    module = importlib.util.module_from_spec(place)
    place.loader.exec_module(module)
    changelog = (GITHUB / "CHANGELOG.md").read_text()
    notes = module.notes(changelog, k8scifar.__version__)
    assert notes.startswith("The first version.") or notes.startswith("###")
    assert "## [" not in notes
    with pytest.raises(LookupError, match=r"nothing about 99\.0\.0"):
        module.notes(changelog, "99.0.0")


def test_hooks_before_a_commit_download_nothing():
    hooks = yaml.safe_load((REPOSITORY / ".pre-commit-config.yaml").read_text())["repos"]
    assert [entry["repo"] for entry in hooks] == ["local"]
    for hook in hooks[0]["hooks"]:
        assert hook["language"] == "system"
        faults = [text for command in documents.split(hook["entry"]) for text in documents.faults(command)]
        assert faults == []
