"""The reports of an attempt's processes, and the exit code and reason that follow from them."""

import pytest

from k8scifar.errors import CRASHED, FAILED, LATE, PEER_LOST, PREEMPTED, USER_MISTAKE
from k8scifar.launch.reports import FOLDER, AgentReport, RankReport, Reports, Writer


def write(folder, agent: str, *ranks: tuple[int | None, str]) -> Reports:
    """Reports of the agent and the ranks, whose reasons come in this order."""
    environment = {FOLDER: str(folder)}
    for number, (code, reason) in enumerate(ranks):
        Writer(f"rank-{number}.json", RankReport(code, reason, float(number)), environment).update()
    Writer("agent.json", AgentReport(reason=agent, reason_at=99.0), environment).update(beats=1)
    return Reports(folder, len(ranks))


@pytest.mark.parametrize(
    ("ranks", "agent", "its_reason", "code", "reason"),
    [
        ([(PEER_LOST, "rank 1 is gone"), (CRASHED, "bug"), (CRASHED, "another")], 1, "", CRASHED, "bug"),
        ([(FAILED, "disk full"), (USER_MISTAKE, "no data")], 1, "", USER_MISTAKE, "no data"),
        ([(LATE, "run folder taken"), (FAILED, "x")], 1, "", LATE, "run folder taken"),
        ([(PREEMPTED, ""), (0, "")], 3, "", PREEMPTED, ""),
        ([(PEER_LOST, "rank 1 is gone"), (None, "")], CRASHED, "", CRASHED, "rank 1 is gone"),
        ([(PEER_LOST, ""), (None, "")], 1, "node 0 was lost", PEER_LOST, "node 0 was lost"),
    ],
)
def test_the_most_serious_rank_decides(tmp_path, ranks, agent, its_reason, code, reason):
    reports = write(tmp_path, its_reason, *ranks)
    assert (reports.exit_code(agent, stopping=False, alone=False), reports.reason) == (code, reason)


def test_a_broken_report_is_an_empty_one_and_a_missing_folder_is_ignored(tmp_path):
    reports = write(tmp_path, "", (0, ""))
    assert reports.all_done and reports.agent.beats == 1
    (tmp_path / "rank-0.json").write_text('{"exit_co')
    assert reports.started and reports.exit_codes == [] and not reports.all_done
    Writer("agent.json", AgentReport(), {FOLDER: str(tmp_path / "none")}).explain("nobody reads it")
