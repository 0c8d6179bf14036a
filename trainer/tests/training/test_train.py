"""Training by real ranks under torchrun on gloo: what a run leaves, resume bit for bit, evaluation shared by ranks."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
import yaml
from runs import TINY, cli, history, run, train_command, weights_hash

from k8scifar.config.loading import merge
from k8scifar.training import checkpoint

pytestmark = pytest.mark.slow

# Optional features are on, because the promises hold with them, too.
SETTINGS = merge(TINY, {"augment": {"flip": "alternating"}, "optimizer": {"norm_bias_lr": 4.0}})


@pytest.fixture
def tiny_config(tmp_path):
    """A YAML file of SETTINGS."""
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(SETTINGS))
    return path


@pytest.fixture(scope="module")
def undisturbed(module_path, tiny_data):
    """An undisturbed two-rank training: (run folder, log)."""
    config = module_path / "tiny.yaml"
    config.write_text(yaml.safe_dump(SETTINGS))
    done = run(train_command(2, config, tiny_data, module_path / "runs", "run"))
    assert done.returncode == 0, done.stderr
    return module_path / "runs" / "run", done.stderr


@pytest.fixture
def finished(undisturbed):
    """The run folder of an undisturbed two-rank training."""
    return undisturbed[0]


@pytest.fixture
def interrupted(finished, tmp_path):
    """``interrupted(step)``: copy the finished run's folder as a crash would leave it after that checkpoint."""

    def copy(step: int):
        folder = tmp_path / "runs" / "run"
        shutil.copytree(finished, folder)
        (folder / "summary.json").unlink()
        (folder / "model.safetensors").unlink()
        for path in checkpoint.listed(folder / "checkpoints"):
            if checkpoint.step_of(path) > step:
                path.unlink()
        return folder

    return copy


def test_run_folder_is_complete(finished):
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["world_size"] == 2
    assert summary["epochs"] == 2
    assert summary["steps"] == 12
    assert summary["test_images"] == 303
    assert 0 <= summary["accuracy"] <= 1
    assert 0 <= summary["accuracy_tta"] <= 1
    assert summary["training_flops"] > 0
    assert summary["images_per_second"] > 0
    assert sum(map(sum, summary["confusion"])) == 303
    assert sum(summary["confusion"][i][i] for i in range(10)) == round(summary["accuracy"] * 303)
    assert summary["versions"]["torch"] == torch.__version__
    assert yaml.safe_load((finished / "config.yaml").read_text())["global_batch"] == 100
    assert [record["epoch"] for record in history(finished)] == [1, 2]
    assert [checkpoint.step_of(path) for path in checkpoint.listed(finished / "checkpoints")] == [12, 6]


def test_tensorboard_holds_every_curve_and_picture(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finished), size_guidance={"images": 0, "tensors": 0})
    events.Reload()
    tags = events.Tags()
    for name in ("step/loss", "step/lr", "step/images_per_second", "train/loss", "test/accuracy", "test/loss"):
        assert name in tags["scalars"]
    shares = [events.Scalars(f"time/{part}")[-1].value for part in ("data", "compute", "communication")]
    assert sum(shares) == pytest.approx(1, abs=1e-5)
    assert min(shares) > 0
    assert {"inputs", "test/confusion", "test/worst_mistakes"} <= set(tags["images"])
    assert any(name.startswith("configuration") for name in tags["tensors"])


def test_log_without_a_terminal(undisturbed):
    log = undisturbed[1]
    (headline,) = [line for line in log.splitlines() if "world size 2" in line]
    for word in ("resnet18", "11,173,962 parameters", "cpu fp32", "gloo", "global batch 100", "600 + 303 images"):
        assert word in headline
    assert "communication: allreduce; all ranks are on one machine" in log
    assert "step " in log
    assert "test accuracy" in log
    assert "\r" not in log


def test_resume_after_an_epoch_equals_the_uninterrupted_run(finished, interrupted, train):
    folder = interrupted(6)
    done = train(2)
    assert done.returncode == 0, done.stderr
    assert "resuming at step 6" in done.stderr
    assert weights_hash(folder) == weights_hash(finished)
    assert history(folder) == history(finished)


def test_sigterm_saves_within_an_epoch_and_resume_equals_the_uninterrupted_run(
    finished, tiny_config, tiny_data, tmp_path
):
    command = train_command(2, tiny_config, tiny_data, tmp_path / "runs", "run", "--set", "log.every_seconds=0.01")
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    for line in process.stderr:
        if " step 2/12 " in line:
            break
    process.send_signal(signal.SIGTERM)
    log = process.communicate(timeout=60)[1]
    assert "stopped by SIGTERM at step" in log
    (saved,) = checkpoint.listed(tmp_path / "runs" / "run" / "checkpoints")
    assert 2 <= checkpoint.step_of(saved) < 6
    payload = checkpoint.load(saved)
    assert payload["seconds"] > 0, "including the steps since the last epoch"
    content = checkpoint.encode(payload | {"seconds": 1000.0})
    saved.with_name(checkpoint.file_name(payload["step"], content)).write_bytes(content)
    saved.unlink()
    done = run(train_command(2, tiny_config, tiny_data, tmp_path / "runs", "run"))
    assert done.returncode == 0, done.stderr
    assert weights_hash(tmp_path / "runs" / "run") == weights_hash(finished)
    assert history(tmp_path / "runs" / "run") == history(finished)
    assert json.loads((tmp_path / "runs" / "run" / "summary.json").read_text())["seconds"] > 1000


def test_damaged_newest_checkpoint_falls_back_to_the_one_before(finished, interrupted, train):
    folder = interrupted(12)
    newest = checkpoint.listed(folder / "checkpoints")[0]
    newest.write_bytes(newest.read_bytes()[:1000])
    done = train(2)
    assert done.returncode == 0, done.stderr
    assert f"{newest.name} is damaged" in done.stderr
    assert "resuming at step 6" in done.stderr
    assert weights_hash(folder) == weights_hash(finished)


def test_finished_run_is_left_alone_and_trains_on_with_more_epochs(finished, train, tmp_path):
    folder = tmp_path / "runs" / "run"
    shutil.copytree(finished, folder)
    done = train(2)
    assert done.returncode == 0
    assert "already finished" in done.stderr
    assert "step " not in done.stderr
    assert weights_hash(folder) == weights_hash(finished)
    done = train(2, "--set", "epochs=3")
    assert done.returncode == 0, done.stderr
    assert "resuming at step 12" in done.stderr
    assert [record["epoch"] for record in history(folder)] == [1, 2, 3]
    assert weights_hash(folder) != weights_hash(finished)


def test_evaluation_is_the_same_number_however_it_is_divided(finished, tiny_data):
    """303 images in batches of 64 on 1, 2 and 3 ranks: accuracy, confusion and loss are equal to the last bit."""
    results = []
    for ranks in (1, 2, 3):
        done = cli_under_torchrun(
            ranks, "evaluate", str(finished), "--data-dir", str(tiny_data), "--json",
            "--set", "evaluation.batch=64", "--set", "hardware.threads=1", "--set", "hardware.precision=fp32",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        results.append(json.loads(done.stdout))
    assert results[0] == results[1] == results[2]
    assert results[0]["images"] == 303
    summary = json.loads((finished / "summary.json").read_text())
    assert results[0]["accuracy"] == summary["accuracy"]
    assert results[0]["loss"] == summary["loss"]


def cli_under_torchrun(ranks, *arguments):
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks))
    return run([*torchrun, "-m", "k8scifar", *arguments])


def test_evaluate_and_predict_for_people_and_programs(finished, tiny_data, tmp_path):
    from PIL import Image

    from k8scifar.data.synthetic import split

    done = cli("evaluate", str(finished), "--data-dir", str(tiny_data))
    assert done.returncode == 0, done.stderr
    assert "test accuracy" in done.stdout
    assert "rings-1.5" in done.stdout
    assert "with flip TTA" in done.stdout
    plain = cli("evaluate", str(finished), "--data-dir", str(tiny_data), "--set", "evaluation.tta=false")
    assert plain.returncode == 0, plain.stderr
    assert "test accuracy" in plain.stdout and "TTA" not in plain.stdout
    Image.fromarray(split(10, seed=5).images[0]).resize((77, 51)).save(tmp_path / "any.png")
    done = cli("predict", str(finished), str(tmp_path / "any.png"), "--json")
    assert done.returncode == 0, done.stderr
    (result,) = json.loads(done.stdout)
    assert len(result["top"]) == 3
    probabilities = [top["probability"] for top in result["top"]]
    assert probabilities == sorted(probabilities, reverse=True)
    assert 0 < sum(probabilities) <= 1.00001
    newest = checkpoint.listed(finished / "checkpoints")[0]
    from_checkpoint = cli("predict", str(newest), str(tmp_path / "any.png"), "--json")
    assert json.loads(from_checkpoint.stdout) == [result], "weights and checkpoint are the same model"
