"""Names and text from outside: checked where they enter, and written out whatever the terminal can show."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import yaml
from data_sets import add, encoded, files, laid, pixels, refused, taken
from runs import cli

from k8scifar.cli import main
from k8scifar.config import loading
from k8scifar.data import packed
from k8scifar.data.prepare import prepare
from k8scifar.errors import UserError
from k8scifar.urls import local

COMPOSED, DECOMPOSED = "caf\u00e9", "cafe\u0301"
SCRIPTS = (
    "\u732b \u3068 \u72ac",
    "\u0441\u043e\u0431\u0430\u043a\u0430",
    "a, b & <b>c",
    "100%",
    "\U0001f431",
    "nan",
)


def of_classes(*names: str, split: str = "") -> dict[str, bytes]:
    return {name: data for name, data in files(classes=names).items() if name.startswith(split)}


# --- class names


def test_one_name_in_two_unicode_forms_is_one_class(tmp_path):
    content = files() | of_classes(DECOMPOSED, split="train") | of_classes(COMPOSED, split="test")
    assert list(taken(laid(tmp_path, content))) == [COMPOSED, "cat", "dog"]


def test_two_forms_in_one_split_are_refused(tmp_path):
    content = files() | of_classes(DECOMPOSED) | of_classes(COMPOSED)
    assert "train/ has two folders called caf\u00e9, in two Unicode forms; rename one" in refused(
        laid(tmp_path, content)
    )


def test_names_of_any_script_are_taken(tmp_path):
    manifest, _ = prepare(tmp_path / "data", f"imagefolder:{laid(tmp_path / 'set', files(classes=SCRIPTS))}")
    assert manifest.classes == sorted(SCRIPTS)


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_name_that_is_no_text_is_refused_before_anything_is_written(tmp_path, encoding):
    laid(tmp_path / "set", files())
    for split in ("train", "test"):
        folder = os.fsencode(tmp_path / "set" / split) + b"/caf\xe9"
        os.makedirs(folder)
        Path(os.fsdecode(folder), "a.png").write_bytes(encoded(pixels(1)))
    done = cli("prepare", "--source", f"imagefolder:{tmp_path / 'set'}", "--data-dir", str(tmp_path / "data"),
               env={"PYTHONIOENCODING": encoding})  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "train/caf\\udce9 has a name that is not UTF-8; rename it" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "data" / packed.MANIFEST).exists()
    assert not list((tmp_path / "data").glob("*.npy"))


def test_an_image_whose_name_is_no_text_is_an_image(tmp_path):
    laid(tmp_path, files())
    Path(os.fsdecode(os.fsencode(tmp_path / "train" / "cat") + b"/caf\xe9.png")).write_bytes(encoded(pixels(1)))
    assert len(taken(tmp_path)["cat"][0]) == 4


@pytest.mark.parametrize("name", ["a\nb", "a\x1bb", "a\x7f", "a\u2028b"])
def test_control_characters_in_a_class_name_are_refused(tmp_path, name):
    assert "can't be a class's name" in refused(laid(tmp_path, files() | of_classes(name)))


# --- run names and paths


@pytest.mark.parametrize("name", [".", "..", "...", ".hidden", "a/b", "my run", "a" * 64, "\u732b", "a\n"])
def test_a_run_name_that_names_no_folder_of_its_own_is_refused(name, capsys, tmp_path):
    assert main(["config", f"--name={name}", "--runs-dir", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "name = " in line
    wanted = "63 characters" if len(name) > 63 else "use letters, digits, `_`, `-` and `.`, no `.` at the start"
    assert wanted in line


@pytest.mark.parametrize("name", ["", "a", "v1.2", "_x", "a..b", "a" * 63])
def test_good_run_names(name):
    assert loading.load(sets=[f"name={json.dumps(name)}"]).name == name


def test_the_schema_refuses_the_same_run_names():
    import jsonschema

    from k8scifar.config.schema import Config

    schema = Config.model_json_schema()
    for name, good in (("..", False), (".", False), (".x", False), ("a b", False), ("v1.2", True), ("", True)):
        assert jsonschema.Draft7Validator(schema).is_valid({"name": name}) == good, name


def test_home_is_expanded_everywhere(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    laid(tmp_path / "pics", files())
    assert main(["prepare", "--source", "imagefolder:~/pics", "--data-dir", "~/data"]) == 0
    assert packed.read_manifest(tmp_path / "data").source == f"imagefolder:{tmp_path}/pics"
    capsys.readouterr()
    assert main(["config", "--data-dir", "~/data", "--runs-dir", "~/runs"]) == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert (config["data"]["dir"], config["runs_dir"]) == (f"{tmp_path}/data", f"{tmp_path}/runs")
    assert main(["report", "~/none"]) == 2
    assert f"{tmp_path}/none" in capsys.readouterr().err
    assert local("~nobody-of-this-name/x") == Path("~nobody-of-this-name/x")


# --- text that a terminal can't show


def test_a_terminal_of_ascii_shows_every_name_escaped(tmp_path):
    from k8scifar.config.sections import Model
    from k8scifar.results import weights as weights_file
    from k8scifar.training import model

    path = tmp_path / "model.safetensors"
    about = {
        "model": Model().model_dump(mode="json"),
        "classes": list(SCRIPTS),
        "mean": [0.5] * 3,
        "std": [0.2] * 3,
        "pixels": 8,
    }
    weights_file.write(path, model.build(Model(), len(SCRIPTS)).state_dict(), about)
    (tmp_path / "\u732b.png").write_bytes(encoded(pixels(1)))
    done = cli("predict", str(path), str(tmp_path / "\u732b.png"), env={"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0, done.stderr
    assert "\\u732b.png: " in done.stdout
    done = cli("predict", str(path), str(tmp_path / "\u72ac.png"), env={"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 2
    assert "\\u72ac.png: there is no such file" in done.stderr
    done = cli("config", "--set", "data.dir=\u732b", env={"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("name", "words"),
    [("none.png", "there is no such file"), (".", "is no file, but a folder"), ("/dev/zero", "pipe or device")],
)
def test_predict_takes_files_alone(tmp_path, name, words):
    from k8scifar.data.reading.tree import read_image

    with pytest.raises(UserError, match=words):
        read_image(str(tmp_path / name))


# --- manifests


GOOD_MANIFEST = "synthetic:50:20"


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda values: [], "is not K8sCIFAR's; choose another --data-dir"),
        (lambda values: {"name": "my web app", "icons": []}, "is not K8sCIFAR's; choose another --data-dir"),
        (lambda values: values | {"format": 99}, "has format 99, not 1; run `k8scifar prepare` again"),
        (lambda values: {"format": 1}, "lacks keys"),
        (lambda values: values | {"surprise": 1}, "lacks keys, or has others"),
        (lambda values: values | {"classes": "cat"}, "classes are no list of names"),
        (lambda values: values | {"classes": [1, 2]}, "classes are no list of names"),
        (lambda values: values | {"counts": [1]}, "counts are not the splits'"),
        (lambda values: values | {"counts": {"train": "many", "test": 20}}, "counts are not the splits'"),
        (lambda values: values | {"pixels": -1}, "pixels is no size"),
        (lambda values: values | {"mean": None}, "mean or std are not three numbers"),
        (lambda values: values | {"std": [0.1, float("nan"), 1]}, "mean or std are not three numbers"),
        (lambda values: values | {"source": 7}, "source is no text"),
        (lambda values: values | {"files": {}}, "files are not the splits'"),
        (lambda values: values | {"files": values["files"] | {"train-images": {"name": "../../x"}}}, "no file for"),
        (lambda values: values | {"files": values["files"] | {"test-labels": 5}}, "no file for test-labels"),
    ],
)  # fmt: skip
def test_a_manifest_that_is_not_ours_or_damaged_is_one_line(tmp_path, edit, words, capsys):
    prepare(tmp_path, GOOD_MANIFEST)
    path = tmp_path / packed.MANIFEST
    path.write_text(json.dumps(edit(json.loads(path.read_text()))))
    before = path.read_text()
    with pytest.raises(UserError) as caught:
        packed.read_manifest(tmp_path)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    capsys.readouterr()
    code = main(["prepare", "--source", GOOD_MANIFEST, "--data-dir", str(tmp_path)])
    said = capsys.readouterr().err
    assert words in said and "Traceback" not in said
    if "not K8sCIFAR's" in words:
        assert code == 2
        assert path.read_text() == before, "another program's file is not written over"
    else:
        assert code == 0
        assert packed.damage(tmp_path, packed.read_manifest(tmp_path)) is None


def test_deeply_nested_json_is_damage(tmp_path):
    (tmp_path / packed.MANIFEST).write_text("[" * 100_000)
    with pytest.raises(UserError, match="is damaged"):
        packed.read_manifest(tmp_path)


def test_arrays_that_are_not_what_the_manifest_says(tmp_path):
    manifest, _ = prepare(tmp_path, GOOD_MANIFEST)
    values = json.loads((tmp_path / packed.MANIFEST).read_text())
    (tmp_path / packed.MANIFEST).write_text(json.dumps(values | {"counts": {"train": 51, "test": 20}}))
    with pytest.raises(UserError, match="are not what its manifest says"):
        packed.read(tmp_path, packed.read_manifest(tmp_path), "train")
    assert manifest.counts["train"] == 50


def test_an_archive_with_names_that_are_no_text(tmp_path):
    import io
    import tarfile

    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for name, data in (files() | of_classes("caf\udce9")).items():
            add(archive, name, data)
    (tmp_path / "data.tar").write_bytes(out.getvalue())
    assert "train/caf\\udce9 has a name that is not UTF-8" in refused(tmp_path / "data.tar")
