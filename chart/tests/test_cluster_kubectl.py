"""The cluster tools with a real kubectl, against a small server that answers as the Kubernetes API does."""

from __future__ import annotations

import shutil

import pytest
from cluster_stage import RUNNING, event, installed, node, pod

pytestmark = [
    pytest.mark.helm,
    pytest.mark.skipif(not shutil.which("kubectl"), reason="needs kubectl on PATH"),
]


@pytest.fixture
def tool(rendered, api):
    """Runs a tool against the server, which holds a release whose pod 1 waits for its data."""
    waiting = pod(rendered, "cifar-1", "trainer", RUNNING, "prepare")
    early = pod(rendered, "cifar-0", "trainer", {"waiting": {"reason": "ImagePullBackOff"}}, "preflight")
    failed = event(early, "Failed", "Failed to pull image x: no such image")
    normal = failed | {"type": "Normal", "message": "fine"}
    api.items = [*installed(rendered, early, waiting), node("node-a"), failed, normal]
    return api.run


def test_status_reads_what_kubectl_prints(tool):
    done = tool("cluster", "status")
    assert done.returncode == 0, done.stderr
    assert "pod cifar-0 on node-a: preflight ImagePullBackOff" in done.stdout
    assert "pod cifar-1 on node-a: prepare running" in done.stdout
    assert (
        "warning: cifar-0: Failed: Failed to pull image x: no such image" in done.stdout and "fine" not in done.stdout
    )


def test_logs_of_pods_that_are_not_so_far(tool):
    done = tool("cluster", "logs")
    assert done.returncode == 0, done.stderr
    assert "log of preflight" in done.stdout and "log of prepare" in done.stdout


def test_no_such_release(tool):
    done = tool("cluster", "status", "--release=other", "--context=here")
    assert done.returncode == 2 and done.stderr.startswith("error: there is no release other in namespace default")
