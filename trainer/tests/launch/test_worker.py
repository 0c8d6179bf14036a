"""A rank's process around `k8scifar train`."""

import os
import subprocess
import sys

from k8scifar.errors import USER_MISTAKE
from k8scifar.launch import node


def test_a_sigterm_that_comes_while_python_takes_itself_down_is_not_heard(tmp_path):
    """torchrun stops the ranks that are left when the first one ends, which are ending themselves."""
    late = "import atexit, os, runpy, signal, sys; atexit.register(os.kill, os.getpid(), signal.SIGTERM); "
    late += "sys.argv = ['worker', 'train', '--set', 'epochs=-1']; "
    command = [sys.executable, "-c", late + f"runpy.run_module({node.WORKER!r}, run_name='__main__')"]
    environment = os.environ | {"K8SCIFAR_SCRATCH": str(tmp_path), "RANK": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == USER_MISTAKE, done.stderr
    (line,) = done.stderr.splitlines()
    assert "epochs" in line
    assert (tmp_path / "exit.1").read_text() == str(USER_MISTAKE)
