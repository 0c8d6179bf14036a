"""The benchmarks run, at sizes that measure nothing, and the table has every row."""

from __future__ import annotations

import dataclasses
import json
import os
import sys

import pytest
from runs import REPOSITORY, run

sys.path.insert(0, str(REPOSITORY / "trainer" / "benchmarks"))
import bench
import scaling
from harness import CannotRun, Options, plain, sets, train_steps

from k8scifar.results import figures


@pytest.fixture
def options(tiny_data):
    return Options(tiny_data, minutes=0.1, tiny=True)


def test_row_is_kept_and_the_table_has_every_row(tiny_data, tmp_path, capsys):
    assert bench.main(["data", "--tiny", "--data", str(tiny_data), "--results", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("data-*.json")
    result = json.loads(path.read_text())
    assert result["found"]["ratio"]["n"] == 1
    assert {"date", "machine", "versions"} <= set(result)
    table = capsys.readouterr().out
    for name in bench.ROWS:
        assert f"\n| {name} | " in table
    assert f"{result['found']['ratio']['median']:.3g}x" in table
    for name in ("gpu", "flops"):
        assert any("needs a GPU" in line for line in table.splitlines() if line.startswith(f"| {name} |"))
    assert "no measurement" in table


def test_row_that_cannot_run_here_says_why_and_keeps_nothing(options, tmp_path, capsys, monkeypatch):
    import row_gpu

    def refuse(_):
        raise CannotRun("needs a GPU: make bench-gpu")

    monkeypatch.setattr(row_gpu, "measure", refuse)
    assert bench.run("gpu", options, tmp_path)
    assert "needs a GPU" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_both_contenders_train(options):
    small = sets(global_batch=20, micro_batch=10, resolution="[{until: 1.0, pixels: 8}]", checkpoint__every_steps=2)
    ours = train_steps(options, 1, 3, *small, BENCH_EVALUATE="3")
    assert len(ours["steps"]) == 2
    assert len(ours["stalls"]) == 1
    assert ours["first_step"] == pytest.approx(sum(ours["stages"].values()), rel=1e-6)
    assert 0 <= ours["curve"][0][1] <= 1
    theirs = plain(options, 1, "--batch", "4", "--steps", "2", "--evaluate", "2", "--test-pictures", "10")
    assert len(theirs["steps"]) == 1
    assert 0 <= theirs["curve"][0][1] <= 1


def test_time_to_accuracy_counts_operations_and_draws_the_curves(options, tmp_path, monkeypatch):
    """By stand-ins for both trainings, and for a run whose own records are read."""
    import row_avx2
    import row_time

    from k8scifar import machine
    from k8scifar.config import loading

    asked = []

    def train(_, ranks, steps, *arguments, **environment):
        bf16 = machine.has_bf16(machine.cpu_features())
        asked.append(({name: os.environ.get(name) for name in row_avx2.ISA}, bf16))
        return {"curve": [(60.0, 0.5, 2), (120.0, 0.8, 4)]}

    monkeypatch.setattr(row_time, "train_steps", train)
    monkeypatch.setattr(row_time, "plain", lambda *_: {"batch": 20, "curve": [(600.0, 0.41, 10)]})
    recorded = tmp_path / "runs" / "longer"
    recorded.mkdir(parents=True)
    values = {"recipe": "quick", "epochs": 2, "global_batch": 100, "micro_batch": 50}
    (recorded / "config.yaml").write_text(loading.validate(values).to_yaml())
    epochs = [
        {"epoch": 1, "step": 6, "seconds": 300.0},
        {"epoch": 2, "step": 12, "seconds": 900.0, "test_accuracy": 0.9},
    ]
    (recorded / "metrics.jsonl").write_text("\n".join(map(json.dumps, epochs)))
    monkeypatch.setenv("BENCH_RUNS", str(recorded))
    assert bench.run("time", options, tmp_path)
    (path,) = tmp_path.glob("time-*.json")
    found = json.loads(path.read_text())["found"]
    image = {pixels: flops / 1e15 for pixels, flops in ((16, 0.833e9), (32, 3.33e9))}
    ours, longer, plainly = found["curves"].values()
    assert ours[1][2] == pytest.approx(2 * ours[0][2], rel=1e-6), "one resolution so far"
    assert ours[0][2] == pytest.approx(2 * (20 * image[16] + 3.1e-5), rel=0.02), "Muon's own are counted"
    assert longer == [[900.0, 0.9, pytest.approx(12 * 100 * image[32], rel=0.02)]]
    assert plainly == [[600.0, 0.41, pytest.approx(10 * 20 * image[32], rel=0.02)]]
    rows = {what.split(" to ")[-1].split(" of ")[0]: (value, aim) for what, value, aim in row_time.lines(found)}
    assert "demo: 2.0 min, " in rows["80%"][0] and "plain: not by 10.0 min, the last look" in rows["80%"][0]
    assert "longer (its records: its own images, evaluation included): 15.0 min, " in rows["90%"][0]
    assert rows["94%"][1] == "published, with flip TTA: 4.35 PFLOP"
    assert "<svg" in (tmp_path / "time.svg").read_text()
    drawn = figures.over_minutes({"ours": [(1.0, 0.5), (2.0, 0.8)], "plain": [(10.0, 0.4)]}).axes[0].lines
    assert [list(line.get_xdata()) for line in drawn] == [[1.0, 2.0], [10.0]]
    # Held-out images are no test images.
    (recorded / "metrics.jsonl").write_text(json.dumps({"heldout_accuracy": 0.9, "step": 12, "seconds": 9.0}))
    with pytest.raises(CannotRun, match="was never evaluated on test images"):
        row_time.of_run(recorded, options.data)
    # The same without bf16: both are told so, and the environment is afterwards as it was.
    monkeypatch.delenv("BENCH_RUNS")
    assert bench.run("avx2", options, tmp_path)
    (before, _), (within, bf16) = asked
    assert within == row_avx2.ISA and not bf16, "so precision auto is fp32"
    assert before == {name: os.environ.get(name) for name in row_avx2.ISA}


def test_scaling_draws_a_picture_and_a_table(tmp_path):
    measured = [{"count": count, "images_per_second": rate} for count, rate in ((1, 50.0), (2, 95.0), (3, 120.0))]
    (tmp_path / "measured.json").write_text(json.dumps({"unit": "nodes", "measured": measured, "note": "two laptops"}))
    assert scaling.main(["--draw", str(tmp_path / "measured.json"), "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "scaling.png").stat().st_size > 10_000
    text = (tmp_path / "out" / "scaling.md").read_text()
    assert text.startswith("| nodes | images/s") and text.endswith("\n\ntwo laptops\n")
    assert "| 2 | 95.0 | 1.90 | 0.95 |\n| 3 | 120.0 | 2.40 | 0.80 |" in text
    left, right = figures.scaling([1, 2, 3], [50.0, 95.0, 120.0]).axes
    assert [list(line.get_ydata()) for line in left.lines] == [[1, 2, 3], [1.0, 1.9, 2.4]]
    assert [list(line.get_ydata()) for line in right.lines] == [[1, 1, 1], [1.0, 0.95, pytest.approx(0.8)]]


def test_scaling_measures_this_machine(tiny_data, tmp_path):
    small = "--set micro_batch=4 --set global_batch=8"
    command = ["make", "scaling", "DATA=synthetic:600:303", f"DATA_DIR={tiny_data}", "RANKS=1"]
    done = run([*command, f"ARGS=--steps 2 --out {tmp_path} {small}", f"VENV={sys.prefix}"], cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    rows = (tmp_path / "scaling.md").read_text().splitlines()
    assert [row.split(" | ")[0] for row in rows[:4]] == ["| ranks", "|---|---|---|---|", "| 1", ""]
    assert rows[2].endswith("| 1.00 | 1.00 |")
    from PIL import Image

    assert Image.open(tmp_path / "scaling.png").size[0] > 1000


def test_rows_of_a_gpu_keep_to_their_time(options, monkeypatch):
    """By stand-ins: two seconds an epoch, ten minutes in all."""
    import row_flops
    import torch

    from k8scifar.config import loading

    assert {name: loading.load(recipe_name=name).epochs for name in row_flops.AIMS} == row_flops.EPOCHS
    now = [0.0]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(row_flops.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(row_flops.time, "time", lambda: now[0])

    def train(_, recipe):
        now[0] += 2.0 * row_flops.EPOCHS[recipe]
        keys = ("accuracy", "accuracy_tta", "training_flops", "seconds", "world_size")
        return dict.fromkeys(keys, 1)

    monkeypatch.setattr(row_flops, "_train", train)
    found = row_flops.measure(dataclasses.replace(options, until=400.0))
    assert list(found["recipes"]) == ["quick", "standard"]
    assert found["left_out"] == {"best": "not run: needs about 4 min more; make gpu GPU_MINUTES=60"}
    told = row_flops.lines(found)
    assert [line[0] for line in told] == ["recipe quick, n = 1", "recipe standard, n = 1", "recipe best"]
