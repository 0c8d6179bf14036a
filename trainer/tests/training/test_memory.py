"""Freed memory is kept: after a few steps a process takes no new pages from the kernel."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys, torch
from k8scifar.training.cpu import memory
if sys.argv[1] == "keep":
    memory.keep()
def step():
    torch.ones(12 << 20)  # 48 MB: by default glibc keeps no block of more than 32 MB
for _ in range(30):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc's malloc")
def test_freed_memory_is_used_again():
    faults = {}
    for how in ("keep", "plain"):
        done = subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True)
        faults[how] = int(done.stdout)
    assert faults["keep"] < 0.1 * faults["plain"]
