"""Whose a run folder is: another release is refused, another training is refused, the same one goes on."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from runs import cli_command, run, train_command, weights_hash

from k8scifar.errors import PeerLost, UserError
from k8scifar.results import ownership

HOLDER = """
import sys, time
from pathlib import Path
from k8scifar.results import ownership
ownership.take(Path(sys.argv[1]), False)
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    monkeypatch.setattr(ownership, "GRACE", 0.3)
    monkeypatch.delenv(ownership.RELEASE, raising=False)
    yield
    ownership.leave()


@pytest.fixture
def holder(tmp_path):
    """Start a process that trains in the folder, in some environment; it is killed at the end."""
    started = []

    def start(**environment):
        command = [sys.executable, "-c", HOLDER, str(tmp_path)]
        process = subprocess.Popen(command, env=os.environ | environment, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def files(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_another_release_is_refused_before_anything_is_changed_unless_it_adopts(tmp_path, monkeypatch):
    monkeypatch.setenv(ownership.RELEASE, "lab/cifar")
    ownership.take(tmp_path, False)
    ownership.leave()
    before = files(tmp_path)
    monkeypatch.setenv(ownership.RELEASE, "team-b/cifar")
    for attempt in (ownership.take, ownership.check_owner):
        with pytest.raises(UserError, match=r"release cifar in namespace lab, .*namespace team-b; .*train\.name"):
            attempt(tmp_path, False)
    assert files(tmp_path) == before
    ownership.take(tmp_path, True)
    ownership.leave()
    assert json.loads((tmp_path / ownership.OWNER).read_text()) == {"release": "team-b/cifar"}
    monkeypatch.setenv(ownership.RELEASE, "lab/cifar")
    with pytest.raises(UserError, match="belongs to release cifar in namespace team-b"):
        ownership.take(tmp_path, False)


def test_the_same_release_and_a_person_without_one_go_on(tmp_path, monkeypatch):
    monkeypatch.setenv(ownership.RELEASE, "lab/cifar")
    for _ in range(2):  # uninstalled and installed again
        ownership.take(tmp_path, False)
        ownership.leave()
    monkeypatch.delenv(ownership.RELEASE)
    ownership.take(tmp_path, False)
    assert json.loads((tmp_path / ownership.OWNER).read_text()) == {"release": "lab/cifar"}


def test_a_second_training_is_refused_with_the_first_ones_name_until_that_is_killed(tmp_path, holder):
    first = holder()
    with pytest.raises(UserError, match=rf"is being trained by process {first.pid} of .* since .*NAME="):
        ownership.take(tmp_path, False)
    first.send_signal(signal.SIGKILL)
    first.wait()
    ownership.take(tmp_path, False)
    ownership.take(tmp_path, False)  # this process has it already


def test_a_pod_waits_for_another_of_its_release_and_is_told_of_others(tmp_path, holder, monkeypatch):
    holder(POD_NAME="cifar-0", **{ownership.RELEASE: "lab/cifar"})
    monkeypatch.setenv(ownership.RELEASE, "lab/cifar")
    with pytest.raises(PeerLost, match="still held by cifar-0"):
        ownership.take(tmp_path, False)
    monkeypatch.delenv(ownership.RELEASE)
    with pytest.raises(UserError, match="pod cifar-0 of release cifar in namespace lab"):
        ownership.take(tmp_path, False)


@pytest.mark.parametrize("content", [b"", b"[]", b"{\xff", b'{"release": 5}', b'"x"'])
def test_a_damaged_owner_is_nobody(tmp_path, monkeypatch, content):
    monkeypatch.setenv(ownership.RELEASE, "lab/cifar")
    (tmp_path / ownership.OWNER).write_bytes(content)
    ownership.take(tmp_path, False)
    assert json.loads((tmp_path / ownership.OWNER).read_text()) == {"release": "lab/cifar"}


def test_two_trainings_of_one_name_one_is_refused_and_the_other_undisturbed(tiny_config, tiny_data, tmp_path):
    """By `k8scifar launch`, as two terminals do it."""
    paths = ["--config", str(tiny_config), "--data-dir", str(tiny_data), "--runs-dir", str(tmp_path), "--name", "same"]
    first = subprocess.Popen(cli_command("launch", *paths, "--set", "epochs=30"), stderr=subprocess.PIPE, text=True)
    try:
        for line in first.stderr:
            if "step " in line:
                break
        second = run(cli_command("launch", *paths, "--set", "epochs=30", "--set", "seed=2"))
        assert second.returncode == 2
        assert len(second.stderr.splitlines()) == 1, second.stderr
        (line,) = second.stderr.splitlines()
        assert "is being trained by process" in line and "NAME=" in line
        assert "seed: 0" in (tmp_path / "same" / "config.yaml").read_text()
        first.send_signal(signal.SIGKILL)  # a crash lets go of the folder
        first.wait()
        end = time.monotonic() + 30
        while True:
            third = run(cli_command("launch", *paths, "--set", "epochs=1"))
            if third.returncode == 0 or time.monotonic() > end:
                break
        assert third.returncode in (0, 2), third.stderr  # 2: the killed one had got further than an epoch
        assert "is being trained" not in third.stderr
    finally:
        first.kill()


def test_another_release_leaves_a_training_s_folder_alone(tiny_config, tiny_data, tmp_path):
    command = train_command(1, tiny_config, tiny_data, tmp_path, "cifar", "--set", "epochs=1")
    mine = run(command, env={ownership.RELEASE: "lab/cifar", "POD_NAME": "cifar-0"})
    assert mine.returncode == 0, mine.stderr
    weights = weights_hash(tmp_path / "cifar")
    before = files(tmp_path / "cifar")
    paths = ["--config", str(tiny_config), "--data-dir", str(tiny_data), "--runs-dir", str(tmp_path), "--name", "cifar"]
    for sets in (("--set", "epochs=1"), ("--set", "epochs=2", "--set", "optimizer.lr=0.5")):
        other = run(cli_command("launch", *paths, *sets, "--restart=always"), env={ownership.RELEASE: "team/cifar"})
        assert other.returncode == 2
        (line,) = other.stderr.splitlines()
        assert "belongs to release cifar in namespace lab" in line and "train.checkpoint.adopt=true" in line
    assert files(tmp_path / "cifar") == before
    adopted = run([*command[:-1], "epochs=2", "--set", "checkpoint.adopt=true"], env={ownership.RELEASE: "team/cifar"})
    assert adopted.returncode == 0, adopted.stderr
    assert "resuming at step 6" in adopted.stderr
    assert weights_hash(tmp_path / "cifar") != weights
