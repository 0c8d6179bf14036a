"""The lease on a run folder: who came last trains, and everyone else stops before it writes, without any locks."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import time

import pytest
import torch
from patience import patient
from runs import HELPERS, cli_command, run

from k8scifar.errors import LATE, Superseded
from k8scifar.results import lease
from k8scifar.results.run_folder import RunFolder

NO_LOCKS = {"PYTHONPATH": str(HELPERS / "faults"), "K8SCIFAR_NO_LOCKS": "1", "K8SCIFAR_RELEASE": "lab/cifar"}
OFTEN = ("--set", "checkpoint.every_steps=2", "--set", "log.tensorboard=false")


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    monkeypatch.delenv("POD_UID", raising=False)
    monkeypatch.delenv("POD_NAME", raising=False)
    yield
    lease.leave()


def numbers(folder):
    return sorted(int(name[:8]) for name in os.listdir(folder / lease.FOLDER))


@pytest.fixture
def taken(tmp_path, monkeypatch):
    """``taken(uid)`` takes the lease as this pod."""

    def take(uid: str) -> None:
        monkeypatch.setenv("POD_UID", uid)
        monkeypatch.setenv("POD_NAME", "cifar-0")
        lease.take(tmp_path)

    return take


def test_each_taker_gets_a_higher_number_and_who_has_a_lower_one_is_late(taken, tmp_path, monkeypatch):
    taken("one")
    lease.check(tmp_path)
    mine = dict(lease._held)
    taken("two")
    lease.check(tmp_path)
    monkeypatch.setattr(lease, "_held", mine)
    with pytest.raises(Superseded, match=r"by pod cifar-0 \(uid two\) since .* \(lease 2, this process has 1\)"):
        lease.check(tmp_path)


def test_a_holder_takes_it_again_but_not_from_who_took_it_over(taken, tmp_path):
    taken("one")
    taken("one")
    taken("two")
    with pytest.raises(Superseded, match="it was this one's before, which is late, and stops"):
        taken("one")
    taken("two")
    taken("three")
    assert numbers(tmp_path) == [2, 4, 5], "one of each former holder, and the newest"


def test_a_number_that_another_takes_at_the_same_moment_is_not_taken_twice(taken, tmp_path, monkeypatch):
    taken("one")
    real, raced = lease._make, []

    def slow(path):
        if not raced:
            raced.append(path)
            path.write_text('{"holder": "faster"}')
        real(path)

    monkeypatch.setattr(lease, "_make", slow)
    taken("two")
    assert numbers(tmp_path)[-2:] == [2, 3]
    lease.check(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"holder": 7}'])
def test_a_lease_that_a_crash_cut_short_is_anothers_and_can_be_taken_over(taken, tmp_path, content):
    taken("one")
    (tmp_path / lease.FOLDER / "00000002.json").write_text(content)
    with pytest.raises(Superseded, match="is trained by another process"):
        lease.check(tmp_path)
    taken("two")
    lease.check(tmp_path)


def test_a_full_disk_takes_no_lease_and_keeps_nobody_from_training(taken, tmp_path, monkeypatch):
    taken("one")

    def full(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(lease, "_make", full)
    taken("two")
    lease.check(tmp_path)
    (tmp_path / lease.FOLDER / "00000002.json").write_text("{}")
    with pytest.raises(Superseded):
        lease.check(tmp_path)


def test_a_late_process_writes_neither_metrics_nor_weights_nor_its_summary(taken, tmp_path, monkeypatch):
    taken("one")
    mine, folder = dict(lease._held), RunFolder(tmp_path)
    taken("two")
    before = files(tmp_path)
    monkeypatch.setattr(lease, "_held", mine)
    for write in (
        lambda: folder.write_metrics([{"epoch": 1}]),
        lambda: folder.export({"weight": torch.ones(1)}, {}),
        lambda: folder.write_summary({}),
    ):
        with pytest.raises(Superseded):
            write()
    assert files(tmp_path) == before


def test_who_took_none_may_write(tmp_path):
    lease.check(tmp_path)


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def started():
    """Start a process; it is killed at the end."""
    processes = []

    def start(command, **environment) -> subprocess.Popen:
        own = os.environ | {"OMP_NUM_THREADS": "1"} | NO_LOCKS | environment
        processes.append(subprocess.Popen(command, env=own, stderr=subprocess.PIPE, text=True))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def until(condition) -> None:
    end = time.monotonic() + patient(60)
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.fixture
def paths(tiny_config, tiny_data, tmp_path):
    places = ("--config", str(tiny_config), "--data-dir", str(tiny_data), "--runs-dir", str(tmp_path))
    return (*places, "--name", "run", *OFTEN)


def test_a_rank_0_that_is_thawed_after_its_successor_took_over_writes_nothing(started, paths, tmp_path):
    faults = {"K8SCIFAR_FAULTS": "rename:step-00000002:freeze", "K8SCIFAR_FAULTS_DIR": str(tmp_path)}
    late = started(cli_command("train", *paths), POD_NAME="cifar-0", POD_UID="old", **faults)
    os.waitpid(late.pid, os.WUNTRACED)  # its checkpoint is written
    successor = run(cli_command("train", *paths), env=NO_LOCKS | {"POD_NAME": "cifar-0", "POD_UID": "new"})
    assert successor.returncode == 0, successor.stderr
    assert "resuming at step 2" in successor.stderr
    before = files(tmp_path / "run")
    late.send_signal(signal.SIGCONT)
    said = late.communicate(timeout=60)[1]
    assert late.returncode == LATE, said
    assert re.search(r"error: run folder \S+ is trained by pod cifar-0 \(uid new\) since .*writes nothing more", said)
    assert files(tmp_path / "run") == before


def test_of_two_pods_with_one_name_the_older_stops_and_stays_out(started, paths, tmp_path):
    long = ("--set", "epochs=400")
    older = started(cli_command("launch", *paths, *long, "--restart=always"), POD_NAME="cifar-0", POD_UID="old")
    checkpoints = tmp_path / "run" / "checkpoints"
    until(lambda: checkpoints.is_dir() and list(checkpoints.glob("step-*")))
    newer = started(cli_command("train", *paths, *long), POD_NAME="cifar-0", POD_UID="new")
    said = older.communicate(timeout=60)[1]
    assert older.returncode == 1, said
    assert "is trained by pod cifar-0 (uid new)" in said and "attempt 2" not in said
    note = (tmp_path / ".nodes" / "run" / "0.json").read_bytes()
    again = run(cli_command("launch", *paths, *long), env=NO_LOCKS | {"POD_NAME": "cifar-0", "POD_UID": "old"})
    assert again.returncode == 1
    assert (tmp_path / ".nodes" / "run" / "0.json").read_bytes() == note and b"failed" not in note
    assert "it was this one's before, which is late, and stops" in again.stderr
    seen = max(checkpoints.glob("step-*")).name
    until(lambda: max(checkpoints.glob("step-*")).name > seen)  # the newer goes on
    newer.terminate()
    said = newer.communicate(timeout=60)[1]
    assert newer.returncode == 3, said
