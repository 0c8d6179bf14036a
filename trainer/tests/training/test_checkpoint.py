"""Checkpoint files: whole or not used, safe to load, pruned with care."""

from __future__ import annotations

import os
import pickle

import pytest
import torch

from k8scifar.errors import Superseded
from k8scifar.results import evaluated
from k8scifar.training import checkpoint
from k8scifar.training.checkpoint import Damaged, Writer, listed, newest_good


def write(folder, steps, keep=10, best_first=()):
    said = []
    writer = Writer(folder, keep, said.append)
    for step in steps:
        writer.save({"step": step, "weights": torch.full((1000,), float(step))}, step, best_first)
    writer.close()
    return said


def steps_of(folder):
    return [checkpoint.step_of(path) for path in listed(folder)]


def test_round_trip_with_torchs_safe_loader(tmp_path):
    assert write(tmp_path, [7]) == []
    (path,) = listed(tmp_path)
    assert checkpoint.load(path)["step"] == 7
    assert torch.load(path, weights_only=True)["weights"][0] == 7.0


def test_newest_are_kept_and_the_best_besides(tmp_path):
    write(tmp_path, [1, 2], keep=2, best_first=[2, 1])
    write(tmp_path, [3, 4, 5], keep=2, best_first=[2, 1])
    assert steps_of(tmp_path) == [5, 4, 2]


def test_the_best_of_the_epochs_that_left_a_checkpoint_is_kept(tmp_path):
    """An evaluation each epoch, a checkpoint each second one; the best epoch left none."""
    accuracies = {1: 0.1, 2: 0.6, 3: 0.9, 4: 0.2, 5: 0.3, 6: 0.4, 8: 0.6}
    for done in (2, 4, 6, 8):
        history = [{"step": step, "test_accuracy": each} for step, each in accuracies.items() if step <= done]
        write(tmp_path, [done], keep=1, best_first=evaluated.best_first(history))
    assert steps_of(tmp_path) == [8, 2]


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "other bytes"])
def test_damaged_file_is_named_and_the_one_before_is_used(tmp_path, damage):
    write(tmp_path, [1, 2])
    newest = listed(tmp_path)[0]
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes({"cut": content[:-50], "flipped": content, "empty": b"", "other bytes": b"hello"}[damage])
    results = list(newest_good(tmp_path))
    assert results[0][1] is None
    assert str(newest) in results[0][2]
    assert checkpoint.decode(results[1][1], "second")["step"] == 1


def test_hostile_file_runs_no_code(tmp_path):
    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "pwned"),)

    path = tmp_path / "hostile.pt"
    torch.save({"format": 1, "payload": Attack()}, path)
    with pytest.raises(Damaged):
        checkpoint.load(path)
    path.write_bytes(pickle.dumps(Attack()))
    with pytest.raises(Damaged):
        checkpoint.load(path)
    assert not (tmp_path / "pwned").exists()


def test_a_late_process_writes_no_checkpoint_and_remembers_why(tmp_path):
    def check() -> None:
        raise Superseded("late")

    writer = Writer(tmp_path, 1, pytest.fail, before=check)
    writer.save({"step": 1}, 1)
    writer.close()
    assert str(writer.late) == "late" and writer.written == (0, 0)
    assert not list(tmp_path.iterdir())


def test_the_best_is_the_first_of_equally_good_epochs():
    history = [{"step": step, "test_accuracy": accuracy} for step, accuracy in ((6, 0.5), (12, 0.7), (18, 0.7))]
    assert evaluated.best_step(history) == 12
    assert evaluated.best_step([*history[:1], {"step": 12}]) == 6


def test_failed_write_warns_and_keeps_what_is_there(tmp_path):
    write(tmp_path, [1])
    before = listed(tmp_path)
    said = []
    writer = Writer(tmp_path / "gone", 1, said.append)
    writer.save({"step": 2}, 2)
    writer.close()
    assert "step 2 could not be written" in said[0]
    assert listed(tmp_path) == before
    assert not list(tmp_path.glob(".*.tmp"))
