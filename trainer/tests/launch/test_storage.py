"""Bad storage: a mount that is slow, stale and late on the other host, and a disk that is full for a while."""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import debian
import pods
import pytest
import yaml
from patience import patient
from runs import HELPERS, TINY, history, weights_hash

from k8scifar import files
from k8scifar.data import packed
from k8scifar.errors import TrainingError
from k8scifar.files import remove_temporary

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
CONFIG = TINY | {
    "distributed": {"timeout_seconds": 8.0, "comm": "allreduce"},
    "checkpoint": {"every_steps": 2},
    "log": {"every_seconds": 0.001},
}


@pytest.fixture(scope="module")
def config(module_path):
    path = module_path / "config.yaml"
    path.write_text(yaml.safe_dump(CONFIG))
    return path


@pytest.fixture(scope="module")
def undisturbed(config, tiny_data):
    """The run folder of an undisturbed training on good storage."""
    with pods.group(config.parent, config, tiny_data, "undisturbed") as group:
        for rank in (0, 1):
            group.start(rank)
        group.until(lambda: group.done, 250, "the end")
    return group.run_dir


@pytest.fixture
def shaky(tmp_path):
    """``shaky(folder, late)`` mounts `folder` once more, shakily; returns where."""
    install_fuse()
    mounted = []

    def mount(folder: Path, late: float = 0.0) -> Path:
        at = tmp_path / f"mount-{len(mounted)}"
        at.mkdir()
        command = [sys.executable, str(HELPERS / "shakyfs.py"), str(folder), str(at), "--late", str(late)]
        mounted.append((at, subprocess.Popen(command)))
        end = time.monotonic() + patient(20)
        while not os.path.ismount(at):
            assert time.monotonic() < end and mounted[-1][1].poll() is None, "the file system was not mounted"
            time.sleep(0.05)
        return at

    yield mount
    for at, process in mounted:
        subprocess.run(["umount", "--lazy", str(at)], check=True)
        process.kill()  # it would serve on for whoever still has a file open
        process.wait(20)


def install_fuse() -> None:
    """Skip where FUSE can't be used; installs its library where the run may (K8SCIFAR_INSTALL)."""
    if os.geteuid() != 0 or not os.path.exists("/dev/fuse"):
        pytest.skip("needs root and /dev/fuse")
    if importlib.util.find_spec("mfusepy") is None:
        pytest.skip("needs the Python package mfusepy")
    if subprocess.run([sys.executable, "-c", "import mfusepy"], capture_output=True).returncode:
        if not debian.may_install():
            pytest.skip("needs libfuse (Debian: libfuse2); K8SCIFAR_INSTALL=1 installs it")
        debian.install("libfuse2")


def test_a_slow_stale_and_late_mount_costs_time_and_nothing_else(shaky, config, tiny_data, tmp_path, undisturbed):
    """Data and runs on it; the second host sees files three seconds late; both pods are killed in mid-training."""
    volume = tmp_path / "volume"
    shutil.copytree(tiny_data, volume / "data")
    (volume / "runs").mkdir()
    mounts = [shaky(volume), shaky(volume, late=3.0)]
    with pods.group(tmp_path, config, tiny_data, "shaky") as group:
        for rank, mount in enumerate(mounts):
            group.start(rank, data=mount / "data", runs=mount / "runs")
        group.until(lambda: group.step >= 9, 200, "step 9")
        for machine in group.machines:
            machine.kill()
        group.until(lambda: group.done, 200, "the end")
        said = group.pods[0].text()
        assert "resuming from" in said
        lost = re.findall(r".*(?:could not be written|can't be read).*", said)
        assert all("TensorBoard" in line for line in lost), lost
        assert "Traceback" not in said + group.pods[1].text()
    assert weights_hash(volume / "runs" / "shaky") == weights_hash(undisturbed)
    assert history(volume / "runs" / "shaky") == history(undisturbed)


def fill(path: Path) -> None:
    """Append until the disk is full."""
    with contextlib.suppress(OSError), open(path, "ab", buffering=0) as file:
        while file.write(bytes(1 << 20)):
            pass


def test_training_goes_on_while_the_disk_is_full_and_ends_when_there_is_space(
    config, tiny_data, tmp_path, small_disk, undisturbed
):
    small = small_disk("330m")
    with pods.group(tmp_path, config, tiny_data, "full") as group:
        for rank in (0, 1):
            group.start(rank, runs=small)
        group.until(lambda: group.step >= 3, 150, "step 3")
        log = group.pods[0].text

        def full() -> bool:  # filled again and again: a file that failed half-written gives its space back
            fill(small / "filler")
            return "model.safetensors could not be written (No space left" in log()

        group.until(full, 90, "a full disk")
        assert "checkpoint of step 12 could not be written (No space left on device)" in log()
        assert "metrics.jsonl could not be written" in log() and "training goes on" in log()
        assert not (small / "full" / "summary.json").exists()
        assert group.step == 12
        (small / "filler").unlink()
        group.until(lambda: group.done, 250, "the end")
        assert [pod.codes for pod in group.pods] == [[], []]
        assert "Traceback" not in log()
        assert weights_hash(small / "full") == weights_hash(undisturbed)


@pytest.mark.parametrize(("number", "tries"), [(errno.ESTALE, 3), (errno.EIO, 3), (errno.ENOSPC, 1), (errno.EACCES, 1)])
def test_what_a_restarting_server_answers_is_tried_again_and_nothing_else(number, tries, monkeypatch):
    monkeypatch.setattr(files, "PAUSES", (0.0, 0.0))
    made = []

    def fail() -> None:
        made.append(number)
        raise OSError(number, os.strerror(number))

    with pytest.raises(OSError, match=os.strerror(number)):
        files.patiently(fail)
    assert len(made) == tries


def test_only_what_was_half_written_is_removed(tmp_path):
    for name in (".step-1.abc.tmp", ".lock", "step-1.pt", "notes.tmp"):
        (tmp_path / name).touch()
    remove_temporary(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "notes.tmp", "step-1.pt"]
    remove_temporary(tmp_path / "none")


def test_data_on_a_volume_that_goes_on_failing_is_no_mistake_of_the_users(tiny_data, monkeypatch):
    manifest = packed.read_manifest(tiny_data)

    def stale(path):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr(files, "PAUSES", (0.0,))
    monkeypatch.setattr(Path, "read_bytes", stale)
    with pytest.raises(TrainingError, match=r"manifest\.json can't be read .*look at its volume"):
        packed.read_manifest(tiny_data)
    with pytest.raises(TrainingError, match=r"\.npy can't be read .*look at its volume"):
        packed.read(tiny_data, manifest, "test")
