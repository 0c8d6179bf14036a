"""Held-out training images: the choice, no test image is read, and results are labelled as held-out."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from runs import history

from k8scifar.cli import main
from k8scifar.config import loading
from k8scifar.data import holdout, packed
from k8scifar.data.prepare import prepare, require
from k8scifar.errors import UserError


def test_held_out_images_are_the_same_and_equally_many_of_each_class():
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 100))
    found = holdout.chosen(labels, 204)
    counts = np.bincount(labels[found], minlength=10)
    assert counts.sum() == 204 and counts.min() == 20 and counts.max() == 21
    assert not np.array_equal(np.flatnonzero(found), np.arange(204)), "not the first ones"
    assert (found <= holdout.chosen(labels, 300)).all(), "more of them hold the fewer"
    few = np.concatenate([np.zeros(3, np.int64), np.ones(97, np.int64)])
    assert np.bincount(few[holdout.chosen(few, 20)]).tolist() == [3, 17]


def test_both_parts_together_are_the_training_images(tiny_data):
    manifest = require(tiny_data)
    whole = packed.read(tiny_data, manifest, "train")
    stay, go = holdout.splits(tiny_data, manifest, 50)
    assert (len(stay), len(go)) == (550, 50)
    both = [image.tobytes() for part in (stay, go) for image in part.images]
    assert sorted(both) == sorted(image.tobytes() for image in whole.images)
    stay, go = holdout.splits(tiny_data, manifest, 0)
    assert (len(stay), len(go)) == (600, 303)


@pytest.mark.parametrize("held", [1, 9, 600, 601])
def test_numbers_that_cannot_be_held_out(tiny_data, held):
    with pytest.raises(
        UserError, match=rf"data.holdout = {held}: of 600 .* 10 to 599 can be held out; set one of these"
    ):
        holdout.left(require(tiny_data), held)
    assert [holdout.left(require(tiny_data), each) for each in (0, 10, 599)] == [600, 590, 1]


def test_a_checkpoint_of_other_held_out_images_is_refused():
    config = loading.load(sets=["data.holdout=50"])
    assert config.differences(config.identity()) == {}
    assert config.differences(loading.load().identity()) == {"data.holdout": (0, 50)}
    former = {key: value for key, value in config.identity().items() if key != "data.holdout"}
    assert config.differences(former) == {"data.holdout": (0, 50)}
    assert config.fingerprint() != loading.load().fingerprint()


@pytest.mark.slow
def test_training_reads_no_test_image_and_labels_results_as_held_out(tiny_config, tmp_path, capsys):
    """One rank; 150 of 600 images are held out, and the files of the test images are missing."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    data, runs = tmp_path / "data", tmp_path / "runs"
    manifest, _ = prepare(data, "synthetic:600:303")
    test = [data / manifest.files[f"test-{kind}"]["name"] for kind in ("images", "labels")]
    for path in test:
        path.rename(tmp_path / path.name)
    paths = ["--config", str(tiny_config), "--data-dir", str(data), "--runs-dir", str(runs), "--name", "run"]
    command = ["train", *paths, "--set", "epochs=1", "--set", "last_batch=pad", "--set", "data.holdout=150"]
    assert main(command) == 0
    said = capsys.readouterr().err
    assert "450 + 150 held-out images" in said and "epochs of 5 steps" in said
    assert said.count("held-out accuracy") == 2 and "test accuracy" not in said
    summary = json.loads((runs / "run" / "summary.json").read_text())
    assert summary["heldout_images"] == sum(map(sum, summary["confusion"])) == 150
    assert summary["identity"]["data.holdout"] == 150
    assert not [key for key in [*summary, *history(runs / "run")[0]] if key.startswith("test")]
    events = EventAccumulator(str(runs / "run"), size_guidance={"images": 0})
    events.Reload()
    tags = [tag for kind in ("scalars", "images") for tag in events.Tags()[kind]]
    assert {"heldout/accuracy", "heldout/loss", "heldout/confusion", "heldout/worst_mistakes"} <= set(tags)
    assert not [tag for tag in tags if tag.startswith("test")]
    page = (runs / "run" / "report.html").read_text()
    shown = page[page.index("<body>") : page.index("<h2>Configuration")]
    assert "held-out accuracy" in shown and not re.search(r"\btest\b", shown)
    first = page.count("data:image/png")
    assert main(["report", str(runs / "run"), "--data-dir", str(data)]) == 0
    assert (runs / "run" / "report.html").read_text().count("data:image/png") == first > 0
    # A run with another number of them, or with none, is refused.
    for held in (100, 0):
        assert main([*command, "--set", f"data.holdout={held}"]) == 2
        assert f"data.holdout 150 -> {held}" in capsys.readouterr().err
    # `evaluate` reads the test images afterwards.
    for path in test:
        (tmp_path / path.name).rename(path)
    assert main(["evaluate", str(runs / "run"), "--data-dir", str(data), "--set", "hardware.device=cpu"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("test accuracy") and "303 images" in out
