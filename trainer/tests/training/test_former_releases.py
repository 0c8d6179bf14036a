"""A run of an earlier release resumes bit for bit.

formers/k8scifar-VERSION.zip is the package of a release: it trains the first steps, with the installed torch. Each
release adds its package.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from runs import TINY, history, run, weights_hash

FORMERS = sorted((Path(__file__).parent / "formers").glob("k8scifar-*.zip"))
CUT_AT = 4  # of 6 steps an epoch

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("former", FORMERS, ids=lambda path: path.stem)
@pytest.mark.parametrize("sets", [(), ("optimizer.name=muon",)], ids=["sgd", "muon"])
def test_a_run_of_an_earlier_release_resumes_bit_for_bit(tiny_data, tmp_path, former, sets):
    (tmp_path / "tiny.yaml").write_text(json.dumps(TINY | {"epochs": 1}))
    options = [part for value in (*sets, f"checkpoint.every_steps={CUT_AT}") for part in ("--set", value)]
    paths = ["--config", str(tmp_path / "tiny.yaml"), "--data-dir", str(tiny_data), "--runs-dir", str(tmp_path)]

    def train(name: str, **environment: str):
        command = [sys.executable, "-P"] if sys.version_info >= (3, 11) else [sys.executable]
        # 0.1.0 had neither the CPU's convolutions nor a learning rate for the norms' biases.
        mine = [] if environment else ["--set", "hardware.products=false", "--set", "optimizer.norm_bias_lr=1"]
        arguments = ["-m", "k8scifar", "train", *paths, "--name", name, *options, *mine]
        return run([*command, *arguments], env=os.environ | environment)

    whole = train("whole")
    assert whole.returncode == 0, whole.stderr
    trained = train("cut", PYTHONPATH=str(former))
    assert trained.returncode == 0, trained.stderr
    folder = tmp_path / "cut"
    for path in folder.iterdir():  # as a crash leaves it: only the checkpoint within the epoch
        if path.is_file():
            path.unlink()
    for path in (folder / "checkpoints").iterdir():
        if f"{CUT_AT:08d}" not in path.name:
            path.unlink()
    resumed = train("cut")
    assert resumed.returncode == 0, resumed.stderr
    assert f"resuming at step {CUT_AT}" in resumed.stderr
    assert weights_hash(folder) == weights_hash(tmp_path / "whole")
    assert history(folder) == history(tmp_path / "whole")
