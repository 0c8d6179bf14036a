"""A power cut at any moment leaves the old value or the new one, whole; once a writer has returned, the new one.

Each writer runs under powerloss.Record; the real reader then reads every state that a power cut may leave.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import powerloss
import pytest
import torch

from k8scifar import files
from k8scifar.config import loading
from k8scifar.data import packed
from k8scifar.data.prepare import prepare
from k8scifar.errors import TrainingError
from k8scifar.ranks import transfer
from k8scifar.results import lease, ownership, participants, weights
from k8scifar.results.run_folder import RunFolder
from k8scifar.training import checkpoint

Work = Callable[[Path], Any]  # with a volume


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    monkeypatch.setenv("POD_UID", "old")
    monkeypatch.setenv(ownership.RELEASE, "lab/cifar")
    yield
    ownership.leave()


@pytest.fixture
def cut(tmp_path):
    """``cut(before, write, read)`` cuts power at each moment of `write`, which runs after `before`."""

    def survive(before: Work, write: Work, read: Work) -> None:
        volume = tmp_path / "volume"
        volume.mkdir()
        before(volume)
        old = read(volume)
        with powerloss.Record(volume) as record:
            write(volume)
        ownership.leave()
        new, found = read(volume), []
        for number, (tree, returned) in enumerate(record.states()):
            value = read(powerloss.lay(tree, tmp_path / f"{number}"))
            assert value == new if returned else value in (old, new), (number, [name for name, _ in tree])
            found.append(value)
        assert old in found and old != new and len(found) > 4

    return survive


def text(path: Path) -> str | None:
    return path.read_text() if path.exists() else None


@pytest.mark.parametrize("former", [None, b"old and long"])
def test_a_file(cut, former):
    before = lambda at: former and (at / "file").write_bytes(former)  # noqa: E731
    cut(before, lambda at: files.write_atomically(at / "file", b"new value"), lambda at: text(at / "file"))


def test_a_checkpoint_and_the_one_before_it_which_is_then_removed(cut):
    def save(at: Path, step: int) -> None:
        writer = checkpoint.Writer(at, 1, pytest.fail)
        writer.save({"step": step, "weights": torch.full((9,), float(step))}, step)
        writer.close()

    def newest(at: Path) -> int:
        found = list(checkpoint.newest_good(at))
        assert not any(why for _, _, why in found), found
        return checkpoint.decode(found[0][1], found[0][0])["step"]

    cut(partial(save, step=1), partial(save, step=2), newest)


@pytest.mark.parametrize("former", [None, "synthetic:20:10"])
def test_a_data_set_whose_manifest_vouches_for_its_files(cut, former):
    def source(at: Path) -> str | None:
        manifest = packed.read_manifest(at / "data")
        assert manifest is None or packed.damage(at / "data", manifest) is None
        return manifest and manifest.source

    make = lambda at, source: source and prepare(at / "data", source)  # noqa: E731
    cut(partial(make, source=former), partial(make, source="synthetic:10:10"), source)


def test_a_run_folder_whose_summary_vouches_for_its_weights(cut):
    config = loading.load(None, [], "demo")

    def finish(at: Path) -> None:
        folder = RunFolder(at / "run")
        folder.create(config)
        folder.write_members([{"from": 0, "nodes": [0, 1], "world_size": 2}])
        folder.write_metrics([{"epoch": 1}])
        digest = folder.export({"weight": torch.ones(3)}, {"pixels": 8})
        folder.write_summary({"weights_sha256": digest})

    def read(at: Path) -> dict[str, Any]:
        folder = RunFolder(at / "run")
        summary, place = folder.summary(), at / "run" / weights.WEIGHTS
        if summary:
            assert hashlib.sha256(place.read_bytes()).hexdigest() == summary["weights_sha256"]
            assert participants.most(folder.path) == 2 and json.loads(text(folder.path / "metrics.jsonl")) == {
                "epoch": 1
            }
            assert text(folder.path / "config.yaml") == config.to_yaml() and folder.checkpoints.is_dir()
        return summary

    cut(lambda at: None, finish, read)


def test_whose_a_run_folder_is(cut, monkeypatch):
    def adopt(at: Path) -> None:
        monkeypatch.setenv(ownership.RELEASE, "team/cifar")
        ownership.take(at, adopt=True)

    before = lambda at: (ownership.take(at, False), ownership.leave())  # noqa: E731
    cut(before, adopt, lambda at: json.loads(text(at / ownership.OWNER))["release"])


def test_a_lease_that_is_taken_stays_taken(cut, monkeypatch):
    """Else a late holder on another NFS client would believe itself the newest. One without a name is nobody's."""

    def take(at: Path) -> None:
        monkeypatch.setenv("POD_UID", "new")
        lease.take(at)

    def holder(at: Path) -> str:
        leases = lease._read(at / lease.FOLDER)
        return leases[max(leases)].get("holder", "old")

    cut(lambda at: (lease.take(at), lease.leave()), take, holder)


def test_a_file_that_another_node_sends(cut):
    content = bytes(range(200))
    file = transfer.File("model.bin", hashlib.sha256(content).hexdigest(), len(content))

    def receive(at: Path) -> None:
        part = transfer._Part(at, file)
        part.open()
        for piece in torch.frombuffer(bytearray(content), dtype=torch.uint8).split(64):
            assert part.add(piece) == ""
        part.finish()
        part.close()

    def read(at: Path) -> bool:
        assert file.is_in(at) == (at / file.name).exists()
        return file.is_in(at)

    cut(lambda at: None, receive, read)


def test_a_file_that_comes_altered_gets_no_name(tmp_path):
    part = transfer._Part(tmp_path, transfer.File("model.bin", hashlib.sha256(b"right").hexdigest(), 5))
    part.open()
    part.add(torch.tensor(list(b"wrong"), dtype=torch.uint8))
    with pytest.raises(TrainingError, match="has another sha256 than was announced"):
        part.finish()
    part.close()
    assert not list(tmp_path.iterdir())
