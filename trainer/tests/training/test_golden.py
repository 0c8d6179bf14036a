"""The losses of tiny trainings are those of golden.json, whatever torch and processor, to the tolerance it states."""

from __future__ import annotations

import json
import sys

import golden
import pytest
from runs import run


@pytest.fixture(scope="module")
def measured():
    done = run([sys.executable, golden.__file__, "--print"])
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("name", [".".join(training) for training in golden.TRAININGS])
def test_losses_are_the_golden_ones(measured, name):
    kept = json.loads(golden.PATH.read_text())
    assert set(kept["losses"]) == {".".join(training) for training in golden.TRAININGS}
    if name not in measured:
        pytest.skip("this processor has no bf16")
    assert len(measured[name]) == golden.STEPS
    assert kept["tolerance"] == golden.TOLERANCE
    assert measured[name] == pytest.approx(kept["losses"][name], rel=kept["tolerance"][name.partition(".")[2]])


def test_differences_are_seen():
    before = {"sgd.fp32": [1.0, 2.0], "muon.fp32": [1.0], "muon.bf16": [1.0]}
    after = {"sgd.fp32": [1.0, 2.5], "muon.fp32": [1.0, 1.0], "sgd.bf16": [1.0]}
    inf = float("inf")
    assert golden.differences(before, after) == {"sgd.fp32": 0.25, "muon.fp32": inf, "muon.bf16": inf, "sgd.bf16": inf}
    assert golden.differences(before, before) == dict.fromkeys(before, 0)
