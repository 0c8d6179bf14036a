"""What torchrun's report of failed ranks comes to."""

import signal
from types import SimpleNamespace

import pytest

from k8scifar.errors import CRASHED, FAILED, PEER_LOST, PREEMPTED, USER_MISTAKE
from k8scifar.launch import agent


@pytest.mark.parametrize(
    ("codes", "expected", "told"),
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
def test_what_a_rank_did_by_itself_counts(codes, expected, told, capsys):
    failures = {rank: SimpleNamespace(exitcode=int(code)) for rank, code in enumerate(codes)}
    assert agent._code(SimpleNamespace(failures=failures)) == expected
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == bool(told) and all(told in line for line in lines)
