"""A rank's process around `k8scifar train`."""

import os
import subprocess
import sys

from k8scifar.errors import USER_MISTAKE
from k8scifar.launch import node, reports


def test_a_sigterm_while_python_shuts_down_changes_nothing(tmp_path):
    """torchrun stops the other ranks when the first one ends, and they are ending already."""
    late = "import atexit, os, runpy, signal, sys; atexit.register(os.kill, os.getpid(), signal.SIGTERM); "
    late += "sys.argv = ['worker', 'train', '--set', 'epochs=-1']; "
    command = [sys.executable, "-c", late + f"runpy.run_module({node.WORKER!r}, run_name='__main__')"]
    environment = os.environ | {reports.FOLDER: str(tmp_path), "RANK": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == USER_MISTAKE, done.stderr
    assert len(done.stderr.splitlines()) == 1
    report = reports.Reports(tmp_path, 1)
    assert report.exit_codes == [USER_MISTAKE] and "epochs" in report.reason
