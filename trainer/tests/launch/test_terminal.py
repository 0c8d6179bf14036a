"""A terminal shows a progress bar, and Ctrl-C acts like SIGTERM."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import termios

import pytest
from runs import cli_command

from k8scifar.training import checkpoint


@pytest.fixture
def terminal(tiny_config, tiny_data, tmp_path):
    """A training by `launch` whose stderr is a terminal: (process, function that reads until a pattern appears)."""
    outer, inner = pty.openpty()
    fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))  # rows and columns
    paths = ("--config", str(tiny_config), "--data-dir", str(tiny_data), "--runs-dir", str(tmp_path), "--name", "run")
    command = cli_command("launch", "--nproc-per-node", "2", *paths, "--set", "epochs=3")
    process = subprocess.Popen(command, stderr=inner, stdout=inner, stdin=inner, start_new_session=True)
    os.close(inner)
    seen = bytearray()

    def read_until(pattern: str) -> str:
        while not re.search(pattern.encode(), seen):
            try:
                seen.extend(os.read(outer, 65536))
            except OSError:  # the other end is closed
                break
        return seen.decode(errors="replace")

    yield process, read_until
    process.kill()
    os.close(outer)


def test_progress_bar_and_ctrl_c(terminal, tmp_path):
    process, read_until = terminal
    shown = r"\| [1-9]\d?/18"
    said = read_until(shown)
    assert re.search(shown, said), said
    assert "img/s" in said
    os.killpg(process.pid, signal.SIGINT)  # as a terminal sends it to the foreground group
    said = read_until("the same command resumes")
    assert "stopped by SIGTERM" in said
    assert process.wait(timeout=60) == 3
    assert "Traceback" not in said
    assert checkpoint.listed(tmp_path / "run" / "checkpoints")
