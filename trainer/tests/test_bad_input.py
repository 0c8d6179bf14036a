"""What users get wrong: one line that says what and what to do, exit code 2, nothing overwritten."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import textwrap

import pytest
from conftest import cli, run, weights_hash

from k8scifar.data import packed
from k8scifar.data.prepare import prepare


def told(done: subprocess.CompletedProcess) -> str:
    """The one line of ours; fails where there is another number of them, or a traceback of ours."""
    lines = [line for line in done.stderr.splitlines() if line.startswith("k8scifar: error:")]
    assert len(lines) == 1, done.stderr
    return lines[0]


def alone(tiny_config, data, runs, *arguments, **options):
    """Train as one plain process."""
    paths = ("--config", str(tiny_config), "--data-dir", str(data), "--runs-dir", str(runs), "--name", "run")
    return cli("train", *paths, *arguments, **options)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--set", "epoch=1"], "did you mean 'epochs'"),
        (["--set", "epochs=soon"], "epochs = 'soon'"),
        (["--set", "optimizer.lr=-0.1"], "optimizer.lr = -0.1"),
        (["--set", "distributed.world_size=2"], "WORLD_SIZE is 1, but distributed.world_size is 2"),
        (["--set", "global_batch=2000", "--set", "micro_batch=100"], "more than the 1000 training pictures"),
        (["--set", "hardware.device=cuda"], "no GPU"),
        (["--recipe", "fastest"], "recipe 'fastest' is unknown"),
        (["--config", "/nowhere/user.yaml"], "check the path"),
    ],
)
def test_configuration_mistakes(tiny_config, tiny_data, tmp_path, arguments, words):
    done = alone(tiny_config, tiny_data, tmp_path / "runs", *arguments, env={"CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 2
    assert words in told(done)
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists(), "nothing is written before the configuration is right"


def test_batch_not_divisible_by_the_world_size(train):
    done = train(3)
    assert done.returncode != 0
    assert "3 ranks can't share" in told(done)


def test_world_size_that_is_not_the_configured_one(train):
    done = train(2, "--set", "distributed.world_size=1")
    assert done.returncode != 0
    assert "WORLD_SIZE is 2, but distributed.world_size is 1" in told(done)


def test_missing_and_damaged_data(tiny_config, tmp_path):
    done = alone(tiny_config, tmp_path / "none", tmp_path / "runs")
    assert done.returncode == 2
    assert "run `k8scifar prepare" in told(done)
    manifest, _ = prepare(tmp_path / "data", "synthetic:200:50")
    victim = tmp_path / "data" / manifest.files["test-images"]["name"]
    victim.write_bytes(victim.read_bytes()[:-1])
    done = alone(tiny_config, tmp_path / "data", tmp_path / "runs")
    assert done.returncode == 2
    assert victim.name in told(done)
    (tmp_path / "data" / packed.MANIFEST).write_text("{")
    done = alone(tiny_config, tmp_path / "data", tmp_path / "runs")
    assert done.returncode == 2
    assert "is damaged" in told(done)


def test_run_folder_that_cannot_be_written(tiny_config, tiny_data, tmp_path):
    (tmp_path / "file").write_text("")
    done = alone(tiny_config, tiny_data, tmp_path / "file" / "runs")
    assert done.returncode == 2
    assert "can't be written" in told(done)


def test_checkpoint_of_another_architecture_configuration_or_data(tiny_config, tiny_data, tmp_path):
    runs = tmp_path / "runs"
    first = alone(tiny_config, tiny_data, runs, "--set", "epochs=1")
    assert first.returncode == 0, first.stderr
    before = weights_hash(runs / "run")
    more = ("--set", "epochs=2")
    done = alone(tiny_config, tiny_data, runs, *more, "--set", "model.name=resnet34")
    assert done.returncode == 2
    assert "model.name resnet18 -> resnet34" in told(done)
    (runs / "run" / "summary.json").rename(runs / "summary.json")
    done = alone(tiny_config, tiny_data, runs, *more, "--set", "optimizer.lr=0.5")
    assert done.returncode == 2
    assert "optimizer.lr 0.02 -> 0.5" in told(done)
    assert "accept_changes" in told(done)
    prepare(tmp_path / "other", "synthetic:500:50")
    done = alone(tiny_config, tmp_path / "other", runs, *more)
    assert done.returncode == 2
    assert "was trained on data" in told(done)
    (runs / "summary.json").rename(runs / "run" / "summary.json")
    assert weights_hash(runs / "run") == before
    done = alone(
        tiny_config, tiny_data, runs, *more, "--set", "optimizer.lr=0.01", "--set", "checkpoint.accept_changes=true"
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((runs / "run" / "summary.json").read_text())["epochs"] == 2


def test_loss_that_is_not_finite(train, tmp_path):
    done = train(2, "--set", "optimizer.lr=100", "--set", "epochs=4", "--set", "checkpoint.keep=9")
    assert done.returncode != 0
    message = told(done)
    assert "not finite at step" in message
    assert "learning rate" in message
    assert not (tmp_path / "runs" / "run" / "summary.json").exists()
    import torch

    from k8scifar import checkpoint

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
    message = told(done)
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
def test_no_such_checkpoint_or_not_one(command, tiny_data, tmp_path):
    rest = ["--data-dir", str(tiny_data)] if command == "evaluate" else [__file__]
    for path, words in ((tmp_path / "none.pt", "there is no checkpoint"), (tmp_path, "holds no trained model")):
        done = cli(command, str(path), *rest)
        assert done.returncode == 2
        assert words in told(done)
    for name in ("junk.pt", "junk.safetensors"):
        (tmp_path / name).write_bytes(b"junk" * 100)
        done = cli(command, str(tmp_path / name), *rest)
        assert done.returncode == 2
        assert name in told(done)


def test_launch_passes_a_mistake_on_without_noise(tiny_config, tmp_path):
    paths = ("--config", str(tiny_config), "--data-dir", str(tmp_path / "none"), "--runs-dir", str(tmp_path))
    done = cli("launch", "--nproc-per-node", "2", *paths)
    assert done.returncode == 2
    assert "there is no data set" in told(done)
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount a small file system")
def test_full_disk_warns_keeps_the_good_checkpoint_and_fails_at_the_end_in_one_line(tiny_config, tiny_data, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    size = 150 * 2**20  # one checkpoint is 90 MB
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(small)], capture_output=True
    ).returncode:
        pytest.skip("this machine does not let root mount a tmpfs")
    try:
        done = alone(tiny_config, tiny_data, small, "--set", "checkpoint.keep=5")
        assert "checkpoint of step 20 could not be written" in done.stderr
        assert "epoch 2/2" in done.stderr, "training went on"
        from k8scifar import checkpoint

        (path,) = checkpoint.listed(small / "run" / "checkpoints")
        assert checkpoint.load(path)["step"] == 10
        assert "Traceback" not in done.stderr
    finally:
        subprocess.run(["umount", str(small)], check=True)
