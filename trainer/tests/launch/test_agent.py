"""The exit code and the reason that follow from torchrun's report of failed ranks."""

import signal

import pytest

from k8scifar.errors import CRASHED, FAILED, PEER_LOST, PREEMPTED, USER_MISTAKE
from k8scifar.launch import agent


@pytest.mark.parametrize(
    ("codes", "expected", "reason"),
    [
        ([-signal.SIGTERM, USER_MISTAKE], USER_MISTAKE, ""),  # torchrun stops the rest
        ([-signal.SIGTERM, FAILED], FAILED, ""),
        ([-signal.SIGTERM, CRASHED], CRASHED, ""),
        ([-signal.SIGKILL, FAILED], CRASHED, "rank 0 died of SIGKILL"),
        ([PEER_LOST, -signal.SIGSEGV], CRASHED, "rank 1 died of SIGSEGV"),
        ([PEER_LOST, -signal.SIGTERM], CRASHED, "rank 1 died of SIGTERM"),
        ([PREEMPTED, PREEMPTED], PREEMPTED, ""),
        ([PEER_LOST, PREEMPTED], FAILED, ""),
    ],
)
def test_a_rank_that_failed_first_decides(codes, expected, reason):
    code, found = agent.verdict(dict(enumerate(map(int, codes))))
    assert code == expected and found.startswith(reason) and bool(found) == bool(reason)
