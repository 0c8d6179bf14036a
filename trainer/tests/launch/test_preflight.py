"""The checks before training, and the output of `k8scifar status`."""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from k8scifar.launch import preflight, sockets
from k8scifar.results import node_status

PYTHON = sys.executable


def check(tmp_path, *arguments, **environment):
    """`k8scifar preflight` on two folders; returns (exit code, the line in the termination message, stderr)."""
    log = tmp_path / "termination-log"
    command = [PYTHON, "-m", "k8scifar", "preflight", "--min-free=1"]
    command += [f"--data-dir={tmp_path}/volume/data", f"--runs-dir={tmp_path}/volume/runs", *arguments]
    environment = os.environ | {"K8SCIFAR_TERMINATION_LOG": str(log)} | environment
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    told = log.read_text() if log.exists() else ""
    assert "Traceback" not in done.stderr
    if done.returncode:
        assert told.strip() in done.stderr and len(told.splitlines()) == 1
    return done.returncode, told, done.stderr


def test_a_good_machine_passes_and_its_folders_are_made(tmp_path):
    code, _, said = check(tmp_path)
    assert code == 0, said
    assert (tmp_path / "volume/data").is_dir() and (tmp_path / "volume/runs").is_dir()
    assert not [path for path in (tmp_path / "volume").rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--interface=eth77"], 12, "train.distributed.interface is eth77, which this machine does not have"),
        (["--min-free=999999999"], 16, "lower preflight.freeMiB"),
        (["--data-dir=/proc/nowhere"], 14, "/proc/nowhere of the dataset volume"),
        (["--runs-dir=/proc/nowhere"], 15, "/proc/nowhere of the checkpoints volume"),
    ],
)
def test_each_failure_has_its_exit_code_and_advice(tmp_path, arguments, code, words):
    found, told, _ = check(tmp_path, *arguments)
    assert (found, words in told) == (code, True), told


@pytest.fixture
def volume(tmp_path):
    """``volume(options)`` mounts a small file system."""
    at = tmp_path / "mounted"
    at.mkdir()
    mounted = []

    def mount(options: str) -> Path:
        if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", at], capture_output=True).returncode:
            pytest.skip("a file system can't be mounted here")
        mounted.append(at)
        return at

    yield mount
    for path in mounted:
        subprocess.run(["umount", path], check=True)


def test_a_full_volume_is_found(volume, tmp_path):
    small = volume("size=64k")
    (small / "filler").write_bytes(b"x" * 65_536)
    code, told, _ = check(tmp_path, f"--runs-dir={small}/runs")
    assert (code, "is full" in told) == (16, True), told


def test_a_read_only_volume_is_found(volume, tmp_path):
    code, told, _ = check(tmp_path, f"--data-dir={volume('ro')}/data")
    assert (code, "mounted read-only" in told) == (14, True), told


def test_too_little_shared_memory_is_found(volume):
    with pytest.raises(preflight.Problem, match="sharedMemorySize") as problem:
        preflight.check_shm(volume("size=1m"))
    assert problem.value.code == 13
    preflight.check_shm(Path("/dev/shm"))


def test_a_folder_of_another_user_is_found_with_its_owner():
    if os.geteuid() != 0:
        pytest.skip("changes its user id")
    folder = Path(tempfile.mkdtemp())
    try:
        folder.chmod(0o755)  # as an NFS export with root_squash
        script = (
            "import locale, os, sys; from k8scifar import cli; from k8scifar.launch import preflight;"
            "os.setgid(1000); os.setuid(1000);"
            f"sys.exit(cli.main(['preflight', '--data-dir={folder}/data', '--runs-dir={folder}/runs']))"
        )
        done = subprocess.run([PYTHON, "-c", script], capture_output=True, text=True, check=False)
    finally:
        folder.rmdir()
    assert done.returncode == 14, done.stderr
    assert f"user 1000:1000 can't write in {folder} of the dataset volume, owned by 0:0, mode 755" in done.stderr
    assert "chown 1000:1000" in done.stderr and "user.uid" in done.stderr


def test_another_cluster_domain_is_guessed(tmp_path):
    resolver = tmp_path / "resolv.conf"
    resolver.write_text("search lab.svc.home.arpa svc.home.arpa home.arpa\nnameserver 10.0.0.1\n")
    assert "set clusterDomain=home.arpa" in sockets.name_advice("a-0.a.lab.svc.cluster.local", resolver)
    assert "clusterDomain" not in sockets.name_advice("a-0.a.lab.svc.home.arpa", resolver)


def status(run_dir, *arguments):
    command = [PYTHON, "-m", "k8scifar", "status", str(run_dir), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    return done.returncode, done.stdout


def test_status_of_a_run_that_has_not_begun(tmp_path):
    assert status(tmp_path / "runs/a") == (
        1,
        "a: waiting: no node has started to train; look at the pods' init containers\n",
    )
    node_status.write(tmp_path / "runs/a", 0, "waiting")
    assert status(tmp_path / "runs/a") == (1, "a: waiting: no node has started to train\n")
    node_status.write(tmp_path / "runs/a", 1, "waiting", "there is no data set in /data yet")
    assert status(tmp_path / "runs/a") == (
        1,
        "a: waiting: no node has started to train\n  node 1: waiting (there is no data set in /data yet)\n",
    )


def test_status_of_a_training_that_moves_and_of_one_that_does_not(tmp_path):
    run = tmp_path / "runs/a"
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text('{"epoch": 3, "step": 12, "test_accuracy": 0.5}\n{"epoch": 4, "st')
    node_status.write(run, 0, "training")
    node_status.write(run, 1, "failed", "rank 1 died")
    code, said = status(run, "--wait=1")
    assert (code, said.splitlines()[0]) == (1, "a: failed: node 1: rank 1 died")
    node_status.write(run, 1, "training")
    code, said = status(run, "--wait=1")
    assert code == 1
    assert said == "a: training, 3 epoch(s) finished, test accuracy 50.00%; nothing was written in 1 s\n"
    stop = threading.Event()

    def keep_writing() -> None:  # a loaded machine may take long to start the command
        while not stop.wait(1.0):
            (run / "events.out").write_text(str(time.time_ns()))

    writer, begun = threading.Thread(target=keep_writing), time.monotonic()
    writer.start()
    try:
        code, said = status(run, "--wait=60")
    finally:
        stop.set()
        writer.join()
    assert (code, said) == (0, "a: training, 3 epoch(s) finished, test accuracy 50.00%\n")
    assert time.monotonic() - begun < 30


def test_status_of_another_releases_run(tmp_path, monkeypatch):
    run = tmp_path / "runs/a"
    run.mkdir(parents=True)
    (run / "owner.json").write_text('{"release": "lab/a"}')
    (run / "summary.json").write_text('{"accuracy": 0.9, "epochs": 1}')
    monkeypatch.setenv("K8SCIFAR_RELEASE", "team/a")
    code, said = status(run)
    assert code == 1
    assert said.startswith("a: failed: run folder") and "belongs to release a in namespace lab" in said


def test_status_of_a_finished_run(tmp_path):
    run = tmp_path / "runs/a"
    run.mkdir(parents=True)
    summary = {"accuracy": 0.9412, "accuracy_tta": 0.95, "epochs": 26, "seconds": 5, "world_size": 2}
    (run / "summary.json").write_text(json.dumps(summary))
    node_status.write(run, 0, "done")
    assert status(run) == (0, "a: done: test accuracy 94.12% (with flip TTA 95.00%) after 26 epochs\n")
    code, said = status(run, "--json")
    assert code == 0 and json.loads(said)["accuracy"] == 0.9412
