"""Processes on machines without /proc and prctl (macOS), and the refusal on Windows."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from k8scifar import cli
from k8scifar.launch import processes

# A parent whose child writes its process id and has to end with the parent.
PARENT = """
import subprocess, sys, time
child = '''
import os, sys, time
sys.platform = "darwin"
from k8scifar.launch import processes
processes.die_with_parent(os.getppid())
open(sys.argv[1], "w").write(str(os.getpid()))
time.sleep(120)
'''
subprocess.Popen([sys.executable, "-c", child, sys.argv[1]])
time.sleep(120)
"""


def _ends(pid: int, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.1)
    return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks into /proc")
def test_a_rank_ends_with_a_killed_launcher_without_prctl(tmp_path):
    note = tmp_path / "pid"
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(note)])
    end = time.monotonic() + 60
    while not (note.exists() and note.read_text()) and time.monotonic() < end:
        time.sleep(0.1)
    child = int(note.read_text())
    assert not _ends(child, 2.0), "its parent lives"
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert _ends(child, 30.0)


@pytest.mark.skipif(not Path("/bin/ps").exists(), reason="needs ps")
def test_descendants_are_found_without_proc(tmp_path, monkeypatch):
    inner = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    child = subprocess.Popen([sys.executable, "-c", inner], start_new_session=True)
    try:
        end, there = time.monotonic() + 30, []
        while len(there) < 2 and time.monotonic() < end:
            there = processes.descendants(os.getpid())
        listed = processes._processes
        monkeypatch.setattr(processes, "_processes", lambda: listed(tmp_path))
        assert sorted(processes.descendants(os.getpid())) == sorted(there)
        assert len(there) == 2, "ps itself is none"
    finally:
        for pid in there:
            os.kill(pid, signal.SIGKILL)
        child.wait()
    assert processes.descendants(os.getpid()) == []


def test_windows_is_refused_with_a_pointer_to_wsl2(monkeypatch, capsys):
    monkeypatch.setattr(sys, "platform", "win32")
    assert cli.main(["train"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "WSL2" in said
    assert "wsl --install" in said
