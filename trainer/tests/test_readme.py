"""What README and the guides tell people to type exists, and what they quote is what the code says."""

from __future__ import annotations

import ast
import functools
import json
import re
from pathlib import Path

import documents
import pytest
from runs import REPOSITORY

README = REPOSITORY / "README.md"
NAMES = [str(path.relative_to(REPOSITORY)) for path in documents.DOCUMENTS]
TROUBLE = REPOSITORY / "chart/docs/troubleshooting.md"
# Messages of Kubernetes and Helm, in the tables of symptoms too.
FOREIGN = (
    *("didn't match pod anti-affinity rules", "didn't match pod affinity rules", "ErrImagePull", "Failed"),
    *("didn't match PersistentVolume's node affinity", "Insufficient memory", "MountVolume.SetUp failed", "Pending"),
    *("ProvisioningFailed", "Terminating", "hostPath type check failed", "local.size"),
)
# Tasks that no test and no workflow runs, and why.
BY_HAND = {
    "bench-gpu": "needs a GPU",
    "golden": "writes anew what a test compares",
    "gpu": "needs a GPU",
    "image-lock": "takes newer versions than this commit was tested with",
    "image-test": "what it does is done by the tests marked engine",
    "sbom": "needs syft or trivy",
    "scan": "needs trivy or grype",
}


@pytest.mark.parametrize("name", NAMES)
def test_every_command_exists(name):
    found = list(documents.commands(REPOSITORY / name))
    assert found
    assert [fault for command in found for fault in documents.faults(command)] == []


@pytest.mark.parametrize(
    "line, fault",
    [
        ("make trian", "no task trian"),
        ("make train RECEIPT=demo", "nothing reads RECEIPT="),
        ("make train RECIPE=dmeo", "no recipe dmeo"),
        ("make train ARGS='--set epoch=2'", "epoch"),
        ("make test TESTS=trainer/tests/test_nothing.py", "no file"),
        ("make test TESTS=trainer/tests/training/test_train.py ARGS='-k unheard'", "unheard"),
        ("make test ARGS='-m gpus'", "gpus"),
        ("make install VALUES=values/nowhere.yaml", "no file values/nowhere.yaml"),
        ("make install HELM_ARGS='--set node=3'", "no value node"),
        ("make install HELM_ARGS='--set nodes=many'", "nodes"),
        ("make install HELM_ARGS='--set resources.limit.memory=8Gi'", "no value resources.limit.memory"),
        ("k8scifar predicct runs/demo", "invalid choice"),
        ("k8scifar config --skema", "unrecognized"),
        ("K8SCIFAR_INSTAL=1 make test", "K8SCIFAR_INSTAL"),
        ("kubeclt get pods", "kubeclt"),
        ("helm install cifar ./chart --set train.epoch=2", "train.epoch"),
    ],
)
def test_a_slip_of_the_pen_is_found(line, fault):
    told = [text for command in documents.split(line) for text in documents.faults(command)]
    assert len(told) == 1
    assert fault in told[0]


def test_every_task_in_the_documents_is_run_somewhere():
    """By a workflow, by what CI runs, or by a test: as `make task`, or as a word of a test's command list."""
    places = [*(REPOSITORY / ".github/workflows").glob("*.yml"), REPOSITORY / ".ci/run"]
    text = "\n".join(path.read_text().replace("\\\n", " ") for path in places)
    run = set(re.findall(r"\bg?make ([a-z][a-z-]*)", text))
    tests = "\n".join(path.read_text() for path in documents.tests())
    run |= set(re.findall(r"\"make\", \"([a-z-]+)\"", tests)) | set(re.findall(r"make\(\"([a-z-]+)\"", tests))
    told = {t for path in documents.DOCUMENTS for c in documents.commands(path) for t in c.targets}
    assert len(told) > 20
    assert sorted(told - run - set(BY_HAND)) == []


@pytest.mark.parametrize("name", NAMES)
def test_every_link_leads_somewhere(name):
    path = REPOSITORY / name
    links = re.findall(r"\]\(([^)\s]+)\)", path.read_text())
    for link in links:
        if re.match(r"https?://", link):
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.exists(), link
        assert not anchor or anchor in documents.anchors(target), link


@pytest.mark.parametrize("name", NAMES)
def test_every_value_in_the_documents_is_the_charts_or_the_trainers(name):
    for key, value in documents.quoted_settings(REPOSITORY / name):
        if documents.value_faults(key, value):  # not the chart's, so it is the trainer's
            placeholder = documents.ANYTHING.search(value)
            text = f"{key}=40" if placeholder else f"{key}={value}"
            assert documents.trainer_faults(["train", "--set", text]) == [], f"--set {key}={value}"


def test_readme_names_every_file_of_values():
    text = README.read_text()
    assert [path.name for path in (REPOSITORY / "values").glob("*.yaml") if f"values/{path.name}" not in text] == []


def test_readme_leads_to_every_guide():
    guides = sorted((REPOSITORY / "chart/docs").glob("*.md"))
    assert len(guides) > 5
    assert [path.name for path in guides if f"](chart/docs/{path.name})" not in README.read_text()] == []


def test_pictures_are_small_and_made_of_what_they_say():
    picture = REPOSITORY / "chart/docs/tensorboard.png"
    assert 20_000 < picture.stat().st_size < 300_000
    drawing = (REPOSITORY / "chart/docs/overview.svg").read_text()
    assert "prefers-color-scheme: dark" in drawing
    assert "/docs/" in (REPOSITORY / "chart/.helmignore").read_text().splitlines()


def symptoms() -> list[str]:
    """What the first columns of the tables of symptoms quote, Kubernetes' own messages left out."""
    lines = TROUBLE.read_text().splitlines()
    heads = {number - 1 for number, line in enumerate(lines) if line.startswith("|---")}
    cells = [line.split("|")[1] for number, line in enumerate(lines) if line.startswith("| ") and number not in heads]
    quoted = [text for cell in cells for text in re.findall(r"`([^`]+)`", cell)]
    return [text for text in quoted if text not in FOREIGN]


@pytest.mark.parametrize("message", symptoms())
def test_a_quoted_message_is_one_of_the_code(message):
    pieces = [piece.strip(" :,;()") for piece in message.split("…")]
    missing = [piece for piece in pieces if not any(piece in said for said in what_the_code_says())]
    assert missing == []
    assert max(len(piece) for piece in pieces) > 7  # enough to find it by


def test_a_message_that_nobody_says_is_found():
    assert not any("the checkpoint is a little tired" in said for said in what_the_code_says())
    assert len(symptoms()) > 15


@functools.cache
def what_the_code_says() -> tuple[str, ...]:
    """Every text in the trainer, in the chart's refusals, tools and probes; what is filled in is …, no docstrings."""
    said = []
    for path in sorted([*(REPOSITORY / "trainer/src").rglob("*.py"), *(REPOSITORY / "chart/tools").glob("*.py")]):
        tree = ast.parse(path.read_text())
        docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        inside = {id(value) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for value in node.values}
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                said.append("".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings | inside:
                said.append(node.value)
    refusals = "\n".join((REPOSITORY / f"chart/templates/{name}.tpl").read_text() for name in ("_validate", "_pod"))
    said += [re.sub(r"%[a-z]", "…", text) for text in re.findall(r"\"((?:[^\"\\]|\\.)*)\"", refusals)]
    types = json.loads((REPOSITORY / "chart/files/rules.json").read_text())["types"]
    said += [each["sentence"] for each in types.values()]
    return tuple(" ".join(text.split()) for text in said)


def test_the_tables_that_are_filled_by_measurement_have_their_places():
    text = README.read_text()
    for name in ("performance",):
        assert re.search(rf"<!-- {name}\b.*?-->.+?<!-- end of {name} -->", text, re.S), name


def test_the_tree_is_as_readme_draws_it():
    tree = re.search(r"## Where things are\n+```text\n(.*?)```", README.read_text(), re.S)
    assert tree
    inside = ""
    for line in tree[1].splitlines():
        names = line.split("  ")[0].split() if not line.startswith(" ") else line.strip().split("  ")[0].split()
        inside = "" if not line.startswith(" ") else inside
        for name in (part for part in names if re.search(r"[/.]|Makefile", part)):
            assert Path(REPOSITORY, inside, name).exists(), name
        if not line.startswith(" "):
            inside = names[0]
