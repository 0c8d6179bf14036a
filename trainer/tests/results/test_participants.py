"""Who took part in a run: the list, and what people are told of it."""

from __future__ import annotations

import json

from k8scifar.results import node_status, participants, status

LIST = [
    {"from": 0, "nodes": [0, 1], "world_size": 2},
    {"from": 9, "nodes": [0], "world_size": 1},
]


def test_who_took_part_is_told_by_step(tmp_path, monkeypatch):
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    found = participants.joined([], participants.present(0, 2))
    assert participants.joined(found, participants.present(7, 2)) == found, "a restart of the same changes nothing"
    monkeypatch.setenv(participants.NODES, "0")
    found = participants.joined(found, participants.present(9, 1))
    assert participants.joined(found, participants.present(9, 1)) == found
    monkeypatch.setenv(participants.NODES, "0,2")
    found = participants.joined(found, participants.present(12, 2))
    assert participants.told(participants.within(found, 0, 20)) == [
        "steps 0 to 9 by 2 rank(s) on nodes 0 and 1",
        "steps 9 to 12 by 1 rank(s) on node 0",
        "steps 12 to 20 by 2 rank(s) on nodes 0 and 2",
    ]
    assert participants.within(found, 0, 6) == [{"from": 0, "to": 6, "nodes": [0, 1], "world_size": 2}]
    assert participants.joined(found, participants.present(9, 2))[1:] == [{"from": 9, "nodes": [0, 2], "world_size": 2}]
    (tmp_path / participants.FILE).write_text(participants.content(tmp_path, found))
    (tmp_path / participants.FILE).write_text(participants.content(tmp_path, found[1:2]))
    assert participants.most(tmp_path) == 2, "who has met in full has done so for good"
    assert json.loads((tmp_path / participants.FILE).read_text())["members"] == found[1:2]


def test_the_status_is_that_of_the_nodes_that_take_part(tmp_path):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / participants.FILE).write_text(participants.content(run_dir, LIST[:1]))
    node_status.write(run_dir, 0, "training")
    node_status.write(run_dir, 1, "failed", "a peer was lost")
    assert status.look(run_dir)["state"] == "failed"
    (run_dir / participants.FILE).write_text(participants.content(run_dir, LIST))
    found = status.look(run_dir)
    assert found["state"] == "training"
    told = status.describe(run_dir, found, 0.0).splitlines()
    assert told == [
        "run: training, in its first epoch, on node 0 alone",
        "  node 1: failed (a peer was lost)",
    ]
    node_status.write(run_dir, 0, "failed", "the volume is away")
    assert status.look(run_dir)["reason"] == "node 0: the volume is away"
