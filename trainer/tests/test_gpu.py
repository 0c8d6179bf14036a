"""On a real GPU: NCCL, repeatable training, compiling, fp16. `make gpu` runs these, about four minutes."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from runs import GPU_ENVIRONMENT, cli, history, weights_hash

from k8scifar.training import checkpoint


def count() -> int:
    """How many GPUs torch can use, asked in a process of its own: the tests' own processes hide them."""
    ask = [sys.executable, "-c", "import torch; print(torch.cuda.device_count() if torch.cuda.is_available() else 0)"]
    done = subprocess.run(ask, capture_output=True, text=True, env=os.environ | GPU_ENVIRONMENT)
    return int(done.stdout or 0)


GPUS = count()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not GPUS, reason="needs an NVIDIA GPU, and a torch build that can use it"),
]
SETS = ["hardware.device=cuda", "log.tensorboard=false", "evaluation.tta=false"]


@pytest.fixture
def trained(tiny_config, tiny_data, tmp_path):
    """``trained("name", "key=value", ...)``: a finished training on one GPU, (run folder, what it said)."""

    def start(name: str, *sets: str, code: int = 0):
        options = [part for value in [*SETS, *sets] for part in ("--set", value)]
        paths = (
            "--config",
            str(tiny_config),
            "--data-dir",
            str(tiny_data),
            "--runs-dir",
            str(tmp_path),
            "--name",
            name,
        )
        done = cli("launch", "--nproc-per-node=1", *paths, *options, env=GPU_ENVIRONMENT)
        assert done.returncode == code, done.stderr
        assert "Warning" not in done.stderr
        return tmp_path / name, done.stderr

    return start


def test_trains_by_nccl_and_says_on_what(trained):
    folder, said = trained("plain", "hardware.precision=auto")
    assert "nccl" in said  # the headline's own word: what was asked for
    assert json.loads((folder / "summary.json").read_text())["device"].startswith("NVIDIA")
    assert 0 < history(folder)[-1]["train_loss"] < 2.5


def test_deterministic_training_repeats_and_resumes_bit_for_bit(trained):
    sets = ["hardware.deterministic=true", "hardware.precision=bf16", "checkpoint.every_steps=4", "checkpoint.keep=9"]
    first, _ = trained("first", *sets)
    again, _ = trained("again", *sets)
    assert weights_hash(again) == weights_hash(first)
    (again / "summary.json").unlink()
    for path in checkpoint.listed(again / "checkpoints"):
        if checkpoint.step_of(path) > 4:
            path.unlink()
    resumed, said = trained("again", *sets)
    assert "resuming at step 4" in said
    assert weights_hash(resumed) == weights_hash(first)


def test_precisions_and_compiling_agree(trained):
    plain, _ = trained("fp32", "hardware.precision=fp32")
    losses = {"fp32": history(plain)[0]["train_loss"]}
    for name, sets in {
        "bf16": ["hardware.precision=bf16"],
        "fp16": ["hardware.precision=fp16"],
        "compiled": ["hardware.precision=fp32", "hardware.compile=true", "micro_batch=25"],
        "uncompiled": ["hardware.precision=fp32", "micro_batch=25"],
    }.items():
        losses[name] = history(trained(name, *sets)[0])[0]["train_loss"]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=2e-2)
    assert losses["fp16"] == pytest.approx(losses["fp32"], rel=2e-2)
    assert losses["compiled"] == pytest.approx(losses["uncompiled"], rel=5e-3)


def test_rank_without_a_gpu_of_its_own_is_told(tiny_config, tiny_data, tmp_path):
    paths = ("--config", str(tiny_config), "--data-dir", str(tiny_data), "--runs-dir", str(tmp_path), "--name", "many")
    one = {"CUDA_VISIBLE_DEVICES": GPU_ENVIRONMENT["CUDA_VISIBLE_DEVICES"].split(",")[0]}
    done = cli("launch", "--nproc-per-node=2", *paths, "--set", "hardware.device=cuda", env=one)
    assert done.returncode == 2
    assert "local rank 1 has no GPU: this machine has 1" in done.stderr
