"""What users get wrong: one line that says what and what to do, exit code 2, nothing overwritten."""

from __future__ import annotations

import json
import socket
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from runs import cli, run, weights_hash

from k8scifar.cli import main
from k8scifar.data import packed
from k8scifar.data.prepare import prepare
from k8scifar.training import checkpoint


def told(stderr: str) -> str:
    """The one line of ours; fails where there is another number of them, or a traceback."""
    lines = [line for line in stderr.splitlines() if line.startswith("k8scifar: error:")]
    assert len(lines) == 1, stderr
    return lines[0]


@pytest.fixture
def here(capsys: pytest.CaptureFixture):
    """``here(command, ...)`` runs `k8scifar` in this process: (exit code, what it said on stderr)."""

    def call(*arguments: str) -> tuple[int, str]:
        capsys.readouterr()
        code = main(list(arguments))
        said = capsys.readouterr().err
        assert "Traceback" not in said
        return code, said

    return call


@pytest.fixture
def alone(here, tiny_config, tiny_data, tmp_path):
    """``alone(..., data=, runs=)`` trains as one plain process: (exit code, what it said on stderr)."""

    def call(*arguments: str, data: Path = tiny_data, runs: Path = tmp_path / "runs") -> tuple[int, str]:
        paths = ("--config", str(tiny_config), "--data-dir", str(data), "--runs-dir", str(runs), "--name", "run")
        return here("train", *paths, *arguments)

    return call


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--set", "epoch=1"], "did you mean 'epochs'"),
        (["--set", "epochs=soon"], "epochs = 'soon'"),
        (["--set", "optimizer.lr=-0.1"], "optimizer.lr = -0.1"),
        (["--set", "distributed.world_size=2"], "WORLD_SIZE is 1, but distributed.world_size is 2"),
        (["--set", "global_batch=2000", "--set", "micro_batch=100"], "more than the 600 training images"),
        (["--set", "hardware.device=cuda"], "no GPU"),
        (["--recipe", "fastest"], "recipe 'fastest' is unknown"),
        (["--config", "/nowhere/user.yaml"], "check the path"),
    ],
)
def test_configuration_mistakes(alone, tmp_path, monkeypatch, arguments, words):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    code, said = alone(*arguments)
    assert code == 2
    assert words in told(said)
    assert not (tmp_path / "runs").exists(), "nothing is written before the configuration is right"


def test_batch_not_divisible_by_the_world_size(train):
    done = train(3)
    assert done.returncode != 0
    assert "3 ranks can't share" in told(done.stderr)


def test_world_size_that_is_not_the_configured_one(train):
    done = train(2, "--set", "distributed.world_size=1")
    assert done.returncode != 0
    assert "WORLD_SIZE is 2, but distributed.world_size is 1" in told(done.stderr)


def test_missing_and_damaged_data(alone, tmp_path):
    code, said = alone(data=tmp_path / "none")
    assert code == 2
    assert "run `k8scifar prepare" in told(said)
    manifest, _ = prepare(tmp_path / "data", "synthetic:200:50")
    victim = tmp_path / "data" / manifest.files["test-images"]["name"]
    victim.write_bytes(victim.read_bytes()[:-1])
    code, said = alone(data=tmp_path / "data")
    assert code == 2
    assert victim.name in told(said)
    (tmp_path / "data" / packed.MANIFEST).write_text("{")
    code, said = alone(data=tmp_path / "data")
    assert code == 2
    assert "is damaged" in told(said)


def test_run_folder_that_cannot_be_written(alone, tmp_path):
    (tmp_path / "file").write_text("")
    code, said = alone(runs=tmp_path / "file" / "runs")
    assert code == 2
    assert "can't be written" in told(said)


def test_checkpoint_of_another_architecture_configuration_or_data(alone, tmp_path):
    runs = tmp_path / "runs"
    code, said = alone("--set", "epochs=1")
    assert code == 0, said
    before = weights_hash(runs / "run")
    more = ("--set", "epochs=2")
    code, said = alone(*more, "--set", "model.name=resnet34")
    assert code == 2
    assert "model.name resnet18 -> resnet34" in told(said)
    prepare(tmp_path / "other", "synthetic:500:50")
    code, said = alone("--set", "epochs=1", data=tmp_path / "other")
    assert code == 2
    assert "is finished on other data (synthetic:600:303)" in told(said)
    (runs / "run" / "summary.json").rename(runs / "summary.json")
    code, said = alone(*more, "--set", "optimizer.lr=0.5")
    assert code == 2
    assert "optimizer.lr 0.02 -> 0.5" in told(said)
    assert "accept_changes" in told(said)
    code, said = alone(*more, data=tmp_path / "other")
    assert code == 2
    assert "was trained on data" in told(said)
    (runs / "summary.json").rename(runs / "run" / "summary.json")
    assert weights_hash(runs / "run") == before
    code, said = alone(*more, "--set", "optimizer.lr=0.01", "--set", "checkpoint.accept_changes=true")
    assert code == 0, said
    assert json.loads((runs / "run" / "summary.json").read_text())["epochs"] == 2


def test_loss_that_is_not_finite(train, tmp_path):
    sets = "optimizer.lr=100", "optimizer.norm_bias_lr=1", "epochs=4", "checkpoint.keep=9"
    done = train(2, *(part for value in sets for part in ("--set", value)))
    assert done.returncode != 0
    message = told(done.stderr)
    assert "not finite at step" in message
    assert "learning rate" in message
    assert not (tmp_path / "runs" / "run" / "summary.json").exists()
    for path in checkpoint.listed(tmp_path / "runs" / "run" / "checkpoints"):
        for name, tensor in checkpoint.load(path)["model"].items():
            if "running" not in name:
                assert torch.isfinite(tensor).all(), f"{path} holds garbage in {name}"


def test_ranks_that_do_not_belong_together_say_what_differs(tiny_config, tiny_data, tmp_path):
    """Each rank gets its own configuration, as two pods of different revisions would."""
    script = tmp_path / "ranks.py"
    script.write_text(
        textwrap.dedent(f"""
        import os, sys
        from k8scifar.cli import main
        paths = ["--config", {str(tiny_config)!r}, "--data-dir", {str(tiny_data)!r}, "--runs-dir", {str(tmp_path)!r}]
        sys.exit(main(["train", *paths, "--set", "optimizer.lr=0.0" + os.environ["RANK"] + "1"]))
        """)
    )
    done = run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)])
    assert done.returncode != 0
    message = told(done.stderr)
    assert "optimizer.lr: 0.001 and 0.011" in message
    assert "rank 0" in message
    assert "rank 1" in message


def test_port_in_use_is_one_line(tiny_config, tiny_data, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        paths = ("--config", str(tiny_config), "--data-dir", str(tiny_data), "--runs-dir", str(tmp_path))
        done = cli("launch", "--nproc-per-node", "2", "--master-port", port, "--wait", "3", *paths)
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if port in line]
    assert lines, done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", ["evaluate", "predict"])
def test_no_such_checkpoint_or_not_one(here, command, tiny_data, tmp_path):
    rest = ["--data-dir", str(tiny_data)] if command == "evaluate" else [__file__]
    for path, words in ((tmp_path / "none.pt", "there is no checkpoint"), (tmp_path, "holds no trained model")):
        code, said = here(command, str(path), *rest)
        assert code == 2
        assert words in told(said)
    for name in ("junk.pt", "junk.safetensors"):
        (tmp_path / name).write_bytes(b"junk" * 100)
        code, said = here(command, str(tmp_path / name), *rest)
        assert code == 2
        assert name in told(said)


def test_launch_passes_a_mistake_on_without_noise(tiny_config, tmp_path):
    paths = ("--config", str(tiny_config), "--data-dir", str(tmp_path / "none"), "--runs-dir", str(tmp_path))
    done = cli("launch", "--nproc-per-node", "2", *paths)
    assert done.returncode == 2
    assert "there is no data set" in told(done.stderr)
    assert "Traceback" not in done.stderr


def test_full_disk_warns_and_keeps_the_good_checkpoint(alone, small_disk):
    small = small_disk("150m")
    _, said = alone("--set", "checkpoint.keep=5", runs=small)
    assert "checkpoint of step 12 could not be written (No space left on device)" in said
    assert "epoch 2/2" in said, "training went on"
    (path,) = checkpoint.listed(small / "run" / "checkpoints")
    assert checkpoint.load(path)["step"] == 6
