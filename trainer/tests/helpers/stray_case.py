"""Not a test of its own: starts all that a test may start, says so, and sleeps. test_janitor.py kills it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import hosts
import janitor

SLEEP = [sys.executable, "-c", "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"]


def test_that_is_killed(tmp_path, small_disk):
    said = Path(os.environ["STRAY_CASE"])
    mounted = small_disk("1m")
    plain = subprocess.Popen(SLEEP)
    apart = subprocess.Popen(SLEEP, env={"PATH": os.environ["PATH"]}, start_new_session=True)
    with hosts.several(("cifar-0.lab", "cifar-1.lab")) as pair:
        pods = [host.popen(SLEEP, {"PATH": os.environ["PATH"]}, tmp_path / "log") for host in pair]
        while not all(host.processes("time.sleep") for host in pair):
            time.sleep(0.05)
        inside = [pid for host in pair for pid in host.processes()]
        pids = [os.getpid(), plain.pid, apart.pid, *(pod.pid for pod in pods), *inside]
        spaces = [space for space in janitor.spaces() if f"-{os.getpid()}-" in space]  # with the bridge's
        told = {"pids": pids, "spaces": spaces, "mount": str(mounted), "runner": os.getpid()}
        said.with_suffix(".part").write_text(json.dumps(told))
        said.with_suffix(".part").rename(said)
        time.sleep(600)
