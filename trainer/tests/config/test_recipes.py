"""Every recipe runs, and two ranks learn the real pictures."""

from __future__ import annotations

import json
import os
import tarfile
from pathlib import Path

import pytest
from runs import REPOSITORY, cli

from k8scifar.cli import main
from k8scifar.config import loading
from k8scifar.data.prepare import prepare

ARCHIVE = Path(os.environ.get("K8SCIFAR_TEST_ARCHIVE", REPOSITORY.parent / "shared" / "data" / "cifar10-images.tar.gz"))


@pytest.mark.parametrize("recipe", loading.recipe_names())
def test_recipe_trains_evaluates_and_exports(recipe, tmp_path):
    """One epoch of 120 pictures, with the recipe's network, resolution, optimiser and augmentation."""
    prepare(tmp_path / "data", "synthetic:120:30")
    small = ("--set", "epochs=1", "--set", "global_batch=40", "--set", "micro_batch=20", "--set", "hardware.threads=1")
    paths = ("--data-dir", str(tmp_path / "data"), "--runs-dir", str(tmp_path / "runs"))
    assert main(["train", "--recipe", recipe, *small, *paths]) == 0
    summary = json.loads((tmp_path / "runs" / recipe / "summary.json").read_text())
    assert summary["test_images"] == 30
    assert summary["steps"] == 3
    assert (tmp_path / "runs" / recipe / "model.safetensors").stat().st_size > 40_000_000


@pytest.mark.realdata
@pytest.mark.skipif(not ARCHIVE.exists(), reason=f"no CIFAR-10 pictures at {ARCHIVE}; set K8SCIFAR_TEST_ARCHIVE")
def test_two_ranks_learn_the_real_pictures(tmp_path):
    """Two epochs of 8,000 real pictures at 12 pixels: 30 % of 2,000 test pictures or more (chance: 10 %)."""
    with tarfile.open(ARCHIVE) as archive, tarfile.open(tmp_path / "part.tar", "w") as part:
        for member in archive:
            number = int(Path(member.name).stem) if member.isfile() else -1
            if 0 <= number < (800 if "train" in member.name else 200):
                part.addfile(member, archive.extractfile(member))
    prepared = cli("prepare", "--source", f"imagefolder:{tmp_path / 'part.tar'}", "--data-dir", str(tmp_path / "data"))
    assert prepared.returncode == 0, prepared.stderr
    assert "8,000 train + 2,000 test images, 10 classes" in prepared.stderr
    values = ("epochs=2", "global_batch=100", "micro_batch=50", "resolution=[{until: 1.0, pixels: 12}]")
    sets = [part for value in (*values, "optimizer.lr=0.1", "augment.cutout=0") for part in ("--set", value)]
    paths = ("--data-dir", str(tmp_path / "data"), "--runs-dir", str(tmp_path / "runs"), "--name", "real")
    done = cli("launch", "--nproc-per-node", "2", *sets, *paths)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "runs" / "real" / "summary.json").read_text())
    assert summary["world_size"] == 2
    assert summary["test_images"] == 2000
    assert summary["accuracy"] > 0.30
    with tarfile.open(tmp_path / "part.tar") as part:
        ship = next(member for member in part if "test/ship" in member.name)
        (tmp_path / "ship.jpg").write_bytes(part.extractfile(ship).read())
    done = cli("predict", str(tmp_path / "runs" / "real"), str(tmp_path / "ship.jpg"))
    assert done.returncode == 0, done.stderr
    assert "%" in done.stdout
