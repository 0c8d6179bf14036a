"""The report: what is in it, that it needs nothing else, and that it never costs a run its end."""

from __future__ import annotations

import json
import re
import threading
from html.parser import HTMLParser

import pytest

from k8scifar.cli import main
from k8scifar.data import packed
from k8scifar.data.prepare import require
from k8scifar.results import ownership, report
from k8scifar.results.outcome import WORST

NASTY = ["<script>alert(1)</script>", r"$\frac{", "quo\"te & 's", "猫"]


class Page(HTMLParser):
    """Every tag with its attributes, and the text outside them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def finished(tmp_path):
    """The folder of a run as `train` leaves it, less the weights; its summary; no training was needed."""
    folder = tmp_path / "runs" / "small"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("recipe: demo\nname: <b>bold</b>\n")
    epochs = [
        {"epoch": 1, "step": 5, "pixels": 8, "lr": 0.2, "train_loss": 2.0, "train_accuracy": 0.25},
        {"epoch": 2, "step": 10, "pixels": 12, "lr": 0.0, "train_loss": 1.5, "train_accuracy": 0.5},
    ]
    epochs[1] |= {"test_loss": 1.25, "test_accuracy": 0.75, "test_images": 40}
    lines = [json.dumps(epoch | {"images_per_second": 100.0, "seconds": 10.0 * epoch["epoch"]}) for epoch in epochs]
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    summary = {
        "accuracy": 0.75, "accuracy_tta": 0.8, "top5": 1.0, "loss": 1.25, "epochs": 2, "steps": 10, "world_size": 2,
        "per_class": dict(zip(NASTY, (1.0, 0.5, 0.5, 1.0), strict=True)),
        "confusion": [[10, 0, 0, 0], [5, 5, 0, 0], [3, 2, 5, 0], [0, 0, 0, 10]],
        "mistakes": [{"image": 3, "true": 1, "predicted": 0, "loss": 4.5}],
        "test_images": 40, "device": "cpu", "precision": "fp32", "global_batch": 100, "images_per_second": 100.0,
        "seconds": 20.0, "parameters": 1234567, "training_flops": 3e12, "weights_sha256": "ab" * 32,
        "data": {"source": "imagefolder:/pictures", "fingerprint": "0123"}, "config_fingerprint": "4567",
        "identity": {"model.name": "resnet18"}, "versions": {"torch": "2.13.0"},
    }  # fmt: skip
    return folder, summary


def test_an_accuracy_on_synthetic_images_says_so_wherever_it_stands(finished, tmp_path):
    from k8scifar.inference import evaluate
    from k8scifar.results import progress, status
    from k8scifar.results.summary import describe

    folder, summary = finished
    record = {"epoch": 2, "train_loss": 1.0, "train_accuracy": 0.5, "pixels": 8, "images_per_second": 9.0}
    record |= {"test_accuracy": 0.75, "test_loss": 1.25, "test_images": 40}
    figures = {"accuracy": 0.75, "accuracy_tta": 0.8, "top5": 1.0, "loss": 1.0, "images": 40, "per_class": [1.0]}
    state = {"state": "training", "nodes": {}, "epoch": 2, "test_accuracy": 0.75}
    done = {"state": "done", "nodes": {}, "accuracy": 0.75, "epochs": 2}
    for source, words in (("synthetic:20:20", " on SYNTHETIC images"), ("imagefolder:/synthetic", ""), ("cifar10", "")):
        data = {"data": {"source": source}}
        line = {"data": source}
        assert f"test accuracy 75.00%{words}, with" in describe(summary | data, folder)
        assert f"test accuracy 75.00%{words} loss" in progress.epoch_line(record | line, 2)
        assert f"test accuracy 75.00%{words}" in status.describe(folder, state | line, 0.0)
        assert f"test accuracy 75.00%{words} after" in status.describe(folder, done | data, 0.0)
        assert f"test accuracy 75.00%{words}, with" in evaluate.describe(figures | line, ["a"])
        assert report.page(folder, summary | data, None).count("on SYNTHETIC images") == (3 if words else 0)
    # And one on held-out images: those words in place of `test`, wherever it stands.
    told, pages, lines = {}, {}, (folder / "metrics.jsonl").read_text()
    for kind, prefix in (("test", "test_"), ("held-out", "heldout_")):
        (folder / "metrics.jsonl").write_text(lines.replace("test_", prefix))
        renamed = {key.replace("test_", prefix): value for key, value in summary.items()}
        told[kind] = [
            describe(renamed, folder),
            progress.epoch_line({key.replace("test_", prefix): value for key, value in record.items()}, 2),
            status.describe(folder, {key.replace("test_", prefix): value for key, value in state.items()}, 0.0),
        ]
        (folder / "summary.json").write_text(json.dumps(renamed))
        pages[kind] = report.page(folder, renamed, None)
        told[kind].append(status.describe(folder, status.look(folder), 0.0))
        (folder / "metrics.jsonl").unlink()  # the summary says it by itself
        told[kind].append(status.describe(folder, status.look(folder), 0.0))
    for test, held_out in zip(told["test"], told["held-out"], strict=True):
        assert "test accuracy 75.00%" in test
        assert held_out == test.replace("test accuracy", "held-out accuracy")
    assert pages["test"].count("75.00%") == pages["held-out"].count("75.00%") == 3
    assert pages["held-out"].count("held-out") == len(re.findall(r"\btest\b", pages["test"])) > 5
    assert not re.search(r"\btest\b", pages["held-out"])


def test_the_page_needs_no_other_file_and_escapes_what_users_write(finished, tiny_data):
    folder, summary = finished
    split = packed.read(tiny_data, require(tiny_data), "test")
    text = report.page(folder, summary, split)
    page = Page(text)
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "object", "b" if attributes.get("class") else "base")
        for name in ("src", "href", "xlink:href", "data", "action"):
            assert re.match(r"data:image/png;base64,|#", attributes.get(name) or "#"), (tag, attributes)
    assert not re.search(r"@import|url\((?!#)", text)
    shown = page.text
    for words in (*NASTY, "name: <b>bold</b>", "75.00%", "80.00%", "1,234,567", "0.003", "ab" * 32, "torch 2.13.0"):
        assert words in shown, words
    assert len([tag for tag, _ in page.tags if tag == "svg"]) == 5, "four curves and the confusion matrix"
    assert len([tag for tag, _ in page.tags if tag == "img"]) == 1
    assert text == report.page(folder, summary, split), "the same for the same inputs"


def test_who_took_part_is_shown_where_that_changed(finished):
    from k8scifar.results.summary import describe

    folder, summary = finished
    assert "took part" not in report.page(folder, summary, None) and "steps" not in describe(summary, folder)
    parts = [{"from": 0, "to": 7, "world_size": 2}, {"from": 7, "to": 10, "nodes": [0], "world_size": 1}]
    for text in (
        report.page(folder, summary | {"members": parts}, None),
        describe(summary | {"members": parts}, folder),
    ):
        assert "steps 0 to 7 by 2 rank(s)" in text and "steps 7 to 10 by 1 rank(s) on node 0" in text


def test_the_pairs_most_often_taken_for_each_other():
    pairs = report._pairs([[10, 0], [3, 7]], ["cat", "dog"])
    assert pairs == [{"true": "dog", "predicted": "cat", "count": 3, "share": 0.3}]


def test_the_time_split_adds_up():
    curves = {
        "step/images_per_second": [(10, 100.0), (30, 50.0)],
        "time/data": [(10, 0.1), (30, 0.2)],
        "time/compute": [(10, 0.8), (30, 0.5)],
        "time/communication": [(10, 0.1), (30, 0.3)],
    }
    parts = report.time_parts(curves, {"global_batch": 100, "seconds": 60.0})
    assert {part["part"]: round(part["seconds"], 6) for part in parts} == {
        "data": 10 * 0.1 + 40 * 0.2, "compute": 10 * 0.8 + 40 * 0.5, "communication": 10 * 0.1 + 40 * 0.3, "rest": 10.0,
    }  # fmt: skip
    assert sum(part["share"] for part in parts) == pytest.approx(1.0)
    assert report.time_parts({}, {"global_batch": 100, "seconds": 60.0}) == []


def test_without_events_and_pictures_it_says_so(finished):
    folder, summary = finished
    text = Page(report.page(folder, summary, None)).text
    assert "Not recorded" in text and "k8scifar report RUN --data-dir DIR shows them" in text


@pytest.mark.parametrize("spoil", ["summary", "folder", "time"])
def test_a_report_that_fails_is_one_line_and_no_failure(finished, spoil, tiny_data, monkeypatch):
    folder, summary = finished
    hurry, released = 60.0, threading.Event()
    if spoil == "summary":
        del summary["confusion"]
    elif spoil == "folder":
        (folder / report.NAME).mkdir()
    else:
        hurry = 0.1
        monkeypatch.setattr(report, "page", lambda *_: released.wait(60) and "late")
    said: list[str] = []
    report.attempt(folder, summary, packed.read(tiny_data, require(tiny_data), "test"), said.append, hurry)
    released.set()
    assert not (folder / report.NAME).is_file()
    assert len(said) == 1 and "no report was written" in said[0] and "\n" not in said[0]


def test_a_training_leaves_its_report_and_it_can_be_written_again(train, tiny_data, tmp_path):
    done = train(1, "--set", "epochs=1", "--set", "log.every_steps=1")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs" / "run"
    first = (folder / report.NAME).read_bytes()
    summary_path = folder / "summary.json"
    assert summary_path.stat().st_mtime_ns >= (folder / report.NAME).stat().st_mtime_ns, "the summary comes last"
    page = Page(first.decode())
    assert "waiting for other ranks" in page.text
    summary = json.loads(summary_path.read_text())
    assert len([tag for tag, _ in page.tags if tag == "img"]) == len(summary["mistakes"]) == WORST
    losses = [mistake["loss"] for mistake in summary["mistakes"]]
    assert losses == sorted(losses, reverse=True)
    labels = packed.read(tiny_data, require(tiny_data), "test").labels
    assert all(labels[each["image"]] == each["true"] != each["predicted"] for each in summary["mistakes"])

    def pictures() -> list[str]:
        assert main(["report", str(folder), "--data-dir", str(tiny_data)]) == 0
        return [attributes["src"] for tag, attributes in Page((folder / report.NAME).read_text()).tags if tag == "img"]

    kept = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    assert pictures() == kept


def test_mistakes_of_a_person(finished, tiny_data, capsys):
    folder, summary = finished
    assert main(["report", str(folder)]) == 2
    assert "has no summary.json; train it first" in capsys.readouterr().err
    (folder / "summary.json").write_text(json.dumps(summary))
    assert main(["report", str(folder), "--data-dir", str(tiny_data)]) == 2
    assert "holds other data" in capsys.readouterr().err
    assert main(["report", str(folder)]) == 0
    assert capsys.readouterr().out.strip() == str(folder / report.NAME)


def test_another_release_s_report_is_not_written_over(tmp_path, monkeypatch, capsys):
    (tmp_path / ownership.OWNER).write_text('{"release": "lab/cifar"}')
    (tmp_path / "summary.json").write_text("{}")
    (tmp_path / report.NAME).write_text("theirs")
    monkeypatch.setenv(ownership.RELEASE, "team/cifar")
    assert main(["report", str(tmp_path)]) == 2
    assert "belongs to release cifar in namespace lab" in capsys.readouterr().err
    assert (tmp_path / report.NAME).read_text() == "theirs"
