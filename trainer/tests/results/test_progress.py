"""Progress, and the step that is named for a loss that is not finite: both read a GPU rarely.

Shows how often a value is read, counted on the CPU; not what a reading costs a GPU.
"""

from __future__ import annotations

import io
import sys
from types import SimpleNamespace

import pytest
import torch

from k8scifar.config import loading
from k8scifar.results import display as displays
from k8scifar.results import progress
from k8scifar.training import divergence, headline
from k8scifar.training.plan import Plan
from k8scifar.training.state import State


@pytest.mark.parametrize("terminal", [True, False])
def test_a_loss_is_read_when_it_is_shown_and_not_each_step(monkeypatch, tmp_path, terminal):
    out = io.StringIO()
    out.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stderr", out)
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    config = loading.load(sets=[f"runs_dir={tmp_path}", "log.tensorboard=false", "log.every_steps=1000"])
    plan = SimpleNamespace(steps=200, steps_per_epoch=200, work=float)
    shown, read = displays.Display(config, None, plan, 0, shown=True), []
    for step in range(1, 201):
        now[0] += 0.0625
        shown.step(step, lambda step=step: read.append(step) or 1.5, 0.1, torch.zeros(1, 3, 8, 8), dict)
    shown.close()
    # The first step is a point of the curves; 12.5 seconds hold fifty looks at the bar, or two lines.
    assert len(read) == (51 if terminal else 3)
    assert read[-1] == (200 if terminal else 160)
    assert "1.5" in out.getvalue()


def test_time_to_go_is_told_early_and_goes_with_the_resolution(monkeypatch, tmp_path):
    out, now = io.StringIO(), [0.0]
    monkeypatch.setattr(sys, "stderr", out)
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    stages = "resolution=[{until: 0.5, pixels: 16}, {until: 1.0, pixels: 32}]"
    sets = [f"runs_dir={tmp_path}", "epochs=4", "global_batch=100", "micro_batch=50", "log.tensorboard=false", stages]
    plan = Plan(loading.load(sets=sets), 2500)  # 50 steps of 16 pixels, 50 of 32, four times as dear
    shown = displays.Display(plan.config, None, plan, 0, True, "; HINT")
    for step in range(1, 101):
        now[0] += 60.0 if step == 1 else 4.0 if step <= 50 else 16.0
        shown.step(step, lambda: 1.5, 0.1, torch.zeros(1, 3, 8, 8), dict)
    lines = [line.partition(" ")[2] for line in out.getvalue().splitlines()]
    (estimate,) = [line for line in lines if "to go" in line]
    assert estimate == "about 16.5 min to go at this machine's speed, evaluations apart; HINT"  # after three steps
    left = {line.split()[1]: line.rpartition(", ")[2] for line in lines if line.startswith("step ")}
    assert left["49/100"] == "13.4 min left"
    assert left["90/100"] == "2.7 min left"


@pytest.mark.parametrize(
    ("device", "precision", "epochs", "offered"),
    [("cpu", "fp32", 2, True), ("cpu", "bf16", 2, False), ("cuda", "fp32", 2, False), ("cpu", "fp32", 1, False)],
)
def test_shorter_training_is_offered_to_processors_without_bf16(device, precision, epochs, offered):
    hint = headline.hint(SimpleNamespace(epochs=epochs), torch.device(device), precision)
    assert ("--set epochs=1" in hint) == offered


def test_step_of_the_first_bad_loss_is_told_however_late_it_is_noticed(monkeypatch):
    state = State.__new__(State)
    state.first_bad = torch.zeros((), dtype=torch.int64)
    for step, loss in enumerate([1.0, 2.0, float("nan"), float("inf"), 1.0], start=1):
        state.step = step
        state.record_first_bad(torch.tensor(loss, dtype=torch.float64))
    assert state.first_bad.item() == 3
    ranks = torch.tensor([[0], [3], [4]])
    monkeypatch.setattr(divergence.agree, "gather", lambda row, world: ranks)
    plan = SimpleNamespace(steps_per_epoch=10, lr=lambda step: 0.125)
    fake = SimpleNamespace(state=state, plan=plan, world=SimpleNamespace(is_main=False))
    assert "not finite at step 3 (epoch 0.30, learning rate 0.125)" in str(divergence.error(fake, 9))
    ranks.zero_()
    assert "not finite at step 9" in str(divergence.error(fake, 9))
