"""What a person reads at the end of a task of the Makefile, at a real terminal, with a real Ctrl-C."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import termios
import time
import urllib.request
from pathlib import Path

import pytest
from chart_helpers import ROOT
from cluster_stage import everything_runs
from patience import patient

BIN = Path(sys.executable).parent
CTRL_C = b"\x03"
LIMIT = 120


def at_terminal(words: list[str], environment: dict[str, str], until: str, keys: bytes = CTRL_C) -> tuple[str, int]:
    """Run make at a terminal, type `keys` once it has printed `until`; all that was read, and the status of waitpid."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(ROOT)
        os.execvpe("make", ["make", *words], environment)
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))  # rows and columns
    seen, end = b"", time.monotonic() + patient(LIMIT)
    while True:
        if not select.select([terminal], [], [], max(0, end - time.monotonic()))[0]:
            os.killpg(pid, signal.SIGKILL)
            raise AssertionError(f"not ended within {LIMIT} s: {seen.decode(errors='replace')}")
        try:
            seen += os.read(terminal, 65536)
        except OSError:  # the other end is closed
            break
        if keys and until.encode() in seen:
            time.sleep(0.5)  # a person's hand; TensorBoard is not ready for it in the moment of its last line
            os.write(terminal, keys)
            keys = b""
    status = os.waitpid(pid, 0)[1]
    os.close(terminal)
    lines = seen.decode(errors="replace").replace("\r\n", "\n").split("\n")
    # Of a line that was written over, what is left to be read.
    shown = [next((part for part in reversed(line.split("\r")) if part), "") for line in lines]
    return "\n".join(line for line in shown if line.strip()), status


@pytest.fixture
def environment(stage) -> dict[str, str]:
    """As make is run here, with a stand-in kubectl first on PATH."""
    outside = {key: value for key, value in os.environ.items() if key not in ("ARGS", "TESTS")}  # of `make test` itself
    return outside | {
        "PATH": f"{stage.bin}:{os.environ['PATH']}",
        "MAKEFLAGS": "",
        "MAKELEVEL": "0",
        "PYTHON": sys.executable,
    }


@pytest.fixture
def venv(tmp_path) -> Path:
    """An environment whose k8scifar takes long, and saves when it is interrupted."""
    folder = tmp_path / "venv"
    (folder / "bin").mkdir(parents=True)
    script = (
        '#!/bin/sh\n[ "$1" != prepare ] || exit 0\n[ "$2" != --check ] || exit 0\n'
        "trap 'echo \"stopped by Ctrl-C; the same command resumes\"; exit 3' INT TERM\n"
        "echo step 1/100\n" + "sleep 0.1\n" * 600
    )
    (folder / "bin" / "k8scifar").write_text(script)
    (folder / "bin" / "k8scifar").chmod(0o755)
    (folder / ".ready").touch()
    return folder


def assert_ended_by_ctrl_c(said: str, status: int) -> None:
    assert "***" not in said and "Traceback" not in said and "Error" not in said, said
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGINT, "a shell sees 130, and stops its script"


def test_ctrl_c_in_train_ends_with_the_trainers_own_words(environment, venv):
    said, status = at_terminal(["train", f"VENV={venv}"], environment, "step 1/100")
    assert_ended_by_ctrl_c(said, status)
    assert said.strip().splitlines()[-1].endswith("stopped by Ctrl-C; the same command resumes")


def test_ctrl_c_in_prepare_does_not_go_on_to_train(environment, venv):
    script = '#!/bin/sh\n[ "$2" != --check ] || exit 0\necho at $1\n[ "$1" != prepare ] || sleep 60\n'
    (venv / "bin" / "k8scifar").write_text(script)
    said, status = at_terminal(["train", f"VENV={venv}"], environment, "at prepare")
    assert_ended_by_ctrl_c(said, status)
    assert "at launch" not in said


@pytest.mark.slow
def test_ctrl_c_in_a_real_training(environment, tiny_config, tiny_data, tmp_path):
    words = ["train", f"VENV={BIN.parent}", f"DATA_DIR={tiny_data}", f"RUNS_DIR={tmp_path / 'runs'}", "NAME=run",
             "DATA=synthetic:600:303", f"ARGS=--config {tiny_config} --set epochs=50"]  # fmt: skip
    said, status = at_terminal(words, environment, "| 2/")
    assert_ended_by_ctrl_c(said, status)
    assert "the same command resumes" in said.strip().splitlines()[-1], said


@pytest.mark.helm
@pytest.mark.parametrize("task", ["logs", "tensorboard-cluster"])
def test_ctrl_c_in_what_follows_a_cluster(environment, stage, rendered, task):
    stage.objects(everything_runs(rendered))
    (stage.home / "slow").touch()
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    until = {"logs": "log of", "tensorboard-cluster": "Forwarding"}[task]
    said, status = at_terminal([task, f"PORT={port}"], environment, until)
    assert_ended_by_ctrl_c(said, status)


def test_ctrl_c_in_tensorboard(environment, tmp_path):
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    words = ["tensorboard", f"VENV={BIN.parent}", f"RUNS_DIR={tmp_path}", f"PORT={port}"]
    said, status = at_terminal(words, environment, "Press CTRL+C")
    assert_ended_by_ctrl_c(said, status)


def test_codes_for_scripts_are_kept(environment, venv):
    """Stopped otherwise than by a terminal, and where k8scifar is called without make."""
    command = [sys.executable, str(ROOT / "trainer/tools/foreground.py"), str(venv / "bin" / "k8scifar"), "launch"]
    for number in (signal.SIGTERM, signal.SIGINT):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
        assert process.stdout.readline() == "step 1/100\n"
        os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
        assert process.communicate(timeout=60)[0].startswith("stopped") and process.returncode == 3
    for script, code in (("exit 2", 2), ("kill -9 $$", 137), ("exit 0", 0)):
        assert subprocess.run([*command[:2], "sh", "-c", script]).returncode == code
    done = subprocess.run([*command[:2], "no-such-program"], capture_output=True, text=True)
    assert done.returncode == 127 and done.stderr == "error: no-such-program: No such file or directory\n"


def test_sigterm_to_make_reaches_the_training(environment, venv):
    """As from a machine that goes down: make passes it on, and waits."""
    command = ["make", "-C", str(ROOT), "train", f"VENV={venv}"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while "step 1/100" not in process.stdout.readline():
        assert process.poll() is None
    process.terminate()
    assert "the same command resumes" in process.communicate(timeout=60)[0]


def test_a_users_mistake_is_told_before_makes_own_line(environment, venv):
    (venv / "bin" / "k8scifar").write_text(
        '#!/bin/sh\n[ "$1" = prepare ] || { echo "error: no such recipe" >&2; exit 2; }\n'
    )
    said, status = at_terminal(["train", f"VENV={venv}"], environment, "never", b"")
    *_, own, makes = said.strip().splitlines()
    assert own == "error: no such recipe" and re.fullmatch(r"make: \*\*\* \[Makefile:\d+: train\] Error 2", makes)
    assert os.waitstatus_to_exitcode(status) == 2


@pytest.fixture
def no_port_variable(environment) -> dict[str, str]:
    return {key: value for key, value in environment.items() if key not in ("HOST", "PORT")}


def test_tensorboard_listens_where_it_is_told_and_only_here(no_port_variable, tmp_path):
    with socket.create_server(("localhost", 0)) as taken:
        port = taken.getsockname()[1]
        words = ["make", "-C", str(ROOT), "tensorboard", f"VENV={BIN.parent}", f"RUNS_DIR={tmp_path}", f"PORT={port}"]
        done = subprocess.run(
            words, env=no_port_variable | {"HOST": "else"}, capture_output=True, text=True, timeout=60
        )
        first = done.stderr.splitlines()[0]
        assert re.fullmatch(rf"error: port {port} of localhost is taken: make tensorboard PORT=\d+", first), done.stderr
        assert done.returncode == 2
    process = subprocess.Popen(words, env=no_port_variable, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + patient(60)
        while True:
            try:
                assert urllib.request.urlopen(f"http://localhost:{port}/", timeout=5).status == 200
                break
            except OSError:
                assert time.monotonic() < end and process.poll() is None
                time.sleep(0.2)
        listening = subprocess.run(["ss", "-Hltn", f"sport = :{port}"], capture_output=True, text=True).stdout
        assert listening and all(
            line.split()[3].rpartition(":")[0] in ("127.0.0.1", "[::1]") for line in listening.splitlines()
        )
    finally:
        process.terminate()
        process.wait(timeout=60)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["PORT=abc"], "error: PORT=abc is no port: a number from 1 to 65535"),
        (["PORT=70000"], "error: PORT=70000 is no port: a number from 1 to 65535"),
        (["HOST=192.0.2.1"], "error: HOST=192.0.2.1 is no address of this machine: localhost, or 0.0.0.0 for all"),
        (["RUNS_DIR=nowhere"], "error: there is no folder nowhere with runs: `make train` first, or RUNS_DIR=..."),
    ],
)
def test_tensorboard_answers_a_mistake_by_one_line(no_port_variable, tmp_path, options, words):
    command = ["make", "-C", str(ROOT), "tensorboard", f"VENV={BIN.parent}", f"RUNS_DIR={tmp_path}", *options]
    done = subprocess.run(command, env=no_port_variable, capture_output=True, text=True, timeout=60)
    own, makes = done.stderr.splitlines()
    assert own.startswith(words) and makes.startswith("make: ***") and done.returncode == 2


@pytest.mark.helm
def test_a_taken_port_of_the_clusters_tensorboard(no_port_variable, stage, rendered):
    stage.objects(everything_runs(rendered))
    with socket.create_server(("localhost", 0)) as taken:
        port = taken.getsockname()[1]
        words = ["make", "-C", str(ROOT), "tensorboard-cluster", f"PORT={port}"]
        done = subprocess.run(words, env=no_port_variable, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert f"error: port {port} of localhost is taken: make tensorboard-cluster PORT=" in done.stderr.splitlines()[0]
    assert not stage.said("port-forward")
