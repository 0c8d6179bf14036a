"""Which nodes node 0 waits for, trains with and takes back, and when."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace

import pytest

from k8scifar.config import loading
from k8scifar.errors import UserError
from k8scifar.launch import command
from k8scifar.launch.elastic import membership
from k8scifar.launch.elastic.membership import Membership, Policy
from k8scifar.launch.node import NodeSpec
from k8scifar.launch.reports import AgentReport
from k8scifar.results import participants

POLICY = Policy(allowed=[1, 2, 3, 4], expected=[0, 1, 2, 3], pauses=[60.0] * 4, missed=1000.0, wait=120.0, met=True)


def test_node_0_waits_for_a_missing_node_and_then_trains_without_it():
    assert POLICY.decide([0, 1, 3], now=1119.0) is None
    assert POLICY.decide([0, 1, 3], now=1120.0) == [0, 1, 3]
    assert POLICY.decide([0, 1, 2, 3], now=1000.0) == [0, 1, 2, 3]


def test_a_group_that_never_met_waits_for_all_nodes():
    fresh = replace(POLICY, met=False)
    assert fresh.decide([0, 1, 3], now=1e9) is None
    assert fresh.decide([0, 1, 2, 3], now=1000.0) == [0, 1, 2, 3]


def test_only_an_allowed_number_of_nodes_takes_part():
    some = replace(POLICY, allowed=[2, 4])
    assert some.decide([0, 1, 3], now=2000.0) == [0, 1]
    assert some.decide([0], now=2000.0) is None


def test_a_node_is_taken_back_after_its_pause_if_the_group_grows():
    policy = replace(POLICY, pauses=[60.0, 60.0, 60.0, 240.0])
    assert policy.returning([0, 1], {2: 59.0, 3: 100.0}) == []
    assert policy.returning([0, 1], {2: 61.0, 3: 100.0}) == [2]
    assert policy.returning([0, 1], {2: 61.0, 3: 241.0}) == [2, 3]
    assert replace(policy, allowed=[2, 4]).returning([0, 1], {2: 61.0, 3: 100.0}) == []
    assert replace(policy, allowed=[2, 4]).returning([0, 2], {1: 61.0}) == [], "it would only replace node 2"


@pytest.fixture
def group(tmp_path, monkeypatch):
    """``group(members, away, back, seconds)`` lets an attempt pass and returns the policy of the next one."""
    clock = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    config = loading.load(None, [f"runs_dir={tmp_path}", "micro_batch=25", "global_batch=100"], "demo")
    spec = NodeSpec(config=config, train_arguments=[], nnodes=2, min_nodes=1)
    memory = Membership(spec)
    config.run_dir.mkdir()

    def policy() -> Policy:
        memory.write_policy(tmp_path)
        return Policy.read(tmp_path)

    def passes(nodes: list[int], away: Sequence[int] = (), back: Sequence[int] = (), seconds: float = 30.0) -> Policy:
        if len(nodes) == 2:
            text = participants.content(config.run_dir, [{"from": 0, "nodes": nodes, "world_size": 2}])
            (config.run_dir / participants.FILE).write_text(text)
        begun = clock[0]
        clock[0] += seconds
        memory.learn(AgentReport(members=nodes, away=list(away), returning=list(back), decided_at=begun))
        return policy()

    passes.first = policy
    passes.memory = memory
    return passes


def test_that_all_nodes_met_once_outlives_a_restart_of_node_0(group):
    assert not group.first().met
    assert group([0, 1]).met
    assert group.first().expected == [0, 1]


def test_a_node_that_was_away_is_not_waited_for_until_it_is_back(group):
    group([0, 1])
    assert group([0], away=[1]).expected == [0]
    assert group([0], back=[1]).expected == [0, 1]


def test_a_node_that_keeps_leaving_waits_longer_until_it_stays(group):
    group([0, 1])
    found = []
    for _ in range(7):
        found.append(group([0], away=[1]).pauses[1])
        group([0], back=[1])
        group([0, 1])
    assert found == [60, 120, 240, 480, 960, 960, 960]
    group([0, 1], seconds=membership.LONGEST * 60.0)
    assert group([0], away=[1]).pauses[1] == 60


def test_a_finished_run_that_meets_again_expects_all_nodes(group, tmp_path):
    group([0, 1])
    assert group([0], away=[1]).expected == [0]
    (tmp_path / "demo" / "summary.json").write_text('{"epochs": 1000}')
    assert group.first().expected == [0, 1]


def test_an_attempt_without_members_changes_nothing(group):
    before = group([0, 1])
    group.memory.learn(AgentReport())
    assert group.first() == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--min-nodes=3"], "--min-nodes 3 is more than --nnodes 2; lower it"),
        (["--min-nodes=0"], None),
        (["--min-nodes=1", "--elastic-wait=0"], "--elastic-wait 0 must be above 0 seconds"),
        (["--min-nodes=1", "--elastic-grow=-1"], "--elastic-grow -1 must be above 0 seconds"),
        (["--min-nodes=1", "--restart=never"], "leave out one of them"),
        (["--elastic-wait=10"], "--elastic-wait needs --min-nodes"),
        (["--elastic-grow=10"], "--elastic-grow needs --min-nodes"),
        (["--set", "distributed.world_size=3"], "distributed.world_size is 3, but --nnodes 2 with --nproc-per-node 1"),
    ],
)
def test_contradictory_options_are_refused(options, words, capsys):
    from k8scifar.cli import main

    arguments = ["launch", "--nnodes=2", "--node-rank=0", "--master-addr=127.0.0.1", "--check", *options]
    if words is None:
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 2
    else:
        assert main(arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert words in line


def test_a_minimum_that_only_all_nodes_could_meet_is_refused(monkeypatch):
    def odd_numbers_only(config, world_size: int) -> None:
        if world_size == 2:
            raise ValueError

    monkeypatch.setattr(membership, "check_world_size", odd_numbers_only)
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    settings = ["--set=micro_batch=10", "--set=global_batch=30"]
    common = ["--nnodes=3", "--node-rank=0", "--master-addr=127.0.0.1", *settings]
    with pytest.raises(UserError, match="only all 3 machines can share a global batch"):
        command.node_spec(parser.parse_args([*common, "--min-nodes=2"]), {})
    spec = command.node_spec(parser.parse_args([*common, "--min-nodes=1"]), {})
    assert spec.is_elastic and membership.allowed(spec) == [1, 3]
    assert not command.node_spec(parser.parse_args(common), {}).is_elastic
