"""Modes of communication: each trains and keeps the replicas equal; `auto` chooses the right one."""

from __future__ import annotations

import re

import pytest
import torch
from runs import CUT_AT, train_in_turn, weights_hash

from k8scifar.config import loading
from k8scifar.errors import UserError
from k8scifar.exchange import auto
from k8scifar.exchange.cost_model import Choice, Times, best, predict
from k8scifar.exchange.local_sgd import SCALE_BLOCK, mean_in_bytes
from k8scifar.ranks.heartbeats import Heartbeats
from k8scifar.ranks.world import World
from k8scifar.training import checkpoint
from k8scifar.training.state import check_resumable

pytestmark = pytest.mark.slow

MODES = ["bf16", "int8", "local-sgd"]  # test_train.py has allreduce
# Of 6 steps local SGD averages after steps 3 and 6.
SHORT = ["epochs=1", "evaluation.tta=false", "checkpoint.keep=9", "distributed.local_sgd_steps=3"]


@pytest.fixture(scope="module")
def trained(module_path, tiny_data):
    """Each mode without interruption, `auto`, and Muon on one machine and on two: (folder, log)."""
    trainings = []
    for mode in MODES:
        sets = [*SHORT, f"distributed.comm={mode}", "log.every_steps=1", *["optimizer.name=muon"] * (mode == "int8")]
        trainings.append({"name": mode, "sets": [*sets, f"checkpoint.every_steps={CUT_AT}"]})
    sets = ["epochs=1", "evaluation.tta=false", "checkpoint.keep=9", "log.tensorboard=false"]
    few = [*sets, "distributed.local_sgd_steps=4", "optimizer.name=muon"]
    shared = [*sets, "optimizer.name=muon", f"checkpoint.every_steps={CUT_AT}"]
    shared += ["distributed.comm=allreduce", "distributed.share=equal"]
    trainings += [
        {"name": "auto", "sets": [*few, f"checkpoint.every_steps={CUT_AT}"], "slow": True},
        {"name": "auto-resumed", "sets": few, "cut": "auto", "slow": True},
        {"name": "asked-for", "sets": [*few, "distributed.comm=local-sgd", "distributed.local_sgd_steps=4"]},
        {"name": "muon", "sets": shared},
        {"name": "muon-apart", "sets": shared, "speeds": [1.0, 1.0]},
        {"name": "muon-resumed", "sets": shared, "cut": "muon-apart", "speeds": [1.0, 1.0]},
        {"name": "muon-taken-over", "sets": shared, "cut": "muon", "speeds": [1.0, 1.0]},
    ]
    done = train_in_turn(module_path, tiny_data, trainings)
    assert done.returncode == 0, done.stderr
    return module_path, done.stderr


def test_gradients_sent_to_their_owners_alone_give_the_weights_of_an_all_reduce_bit_for_bit(trained):
    """Without interruption; resumed; and resumed from a checkpoint of ranks on one machine, which all-reduce."""
    folder, _ = trained
    for name in ("muon-apart", "muon-resumed", "muon-taken-over"):
        assert weights_hash(folder / name) == weights_hash(folder / "muon")
    assert (folder / "muon-apart.gradients").exists() and not (folder / "muon.gradients").exists(), "two machines, one"
    saved = [checkpoint.load(path) for path in (folder / "muon-apart" / "checkpoints").glob(f"step-{CUT_AT:08d}-*.pt")]
    momenta = [state["momentum_buffer"] for state in saved[0]["optimizer"]["state"].values()]
    assert len(momenta) == 62 and all(momentum.any() for momentum in momenta), "every parameter's, whoever owns it"


def test_choice_of_auto_is_kept_and_measuring_changes_nothing(trained):
    folder, said = trained
    told = re.search(r"communication: local-sgd, averaged every 4 steps; an all-reduce .*predicted.*", said)
    assert auto.COST in told[0]
    assert "communication: local-sgd, averaged every 4 steps; kept from the checkpoint" in said
    assert weights_hash(folder / "auto") == weights_hash(folder / "asked-for")
    assert weights_hash(folder / "auto-resumed") == weights_hash(folder / "asked-for")


def test_replicas_are_bit_identical_and_the_modes_differ(trained):
    folder, _ = trained
    ranks = [(folder / f"hashes.{rank}").read_text().splitlines() for rank in range(2)]
    assert ranks[0] == ranks[1]
    assert any(line.startswith("averaged ") for line in ranks[0]), "local SGD within an epoch"
    last = {line.split()[0]: line.split()[2] for line in ranks[0] if line.split()[1] == "6"}
    assert len(last) == len(MODES) + 7
    assert len(set(last.values())) == len(MODES) + 2


def test_checkpoint_holds_what_each_mode_carries(trained):
    weights = 11_173_962
    for mode, expected in [("bf16", None), ("int8", (2, 11_156_544)), ("local-sgd", (2, 2 * weights))]:
        (path,) = (trained[0] / mode / "checkpoints").glob(f"step-{CUT_AT:08d}-*.pt")
        saved = checkpoint.load(path)["comm"]
        assert saved["mode"] == mode
        if expected is None:
            assert saved["own"] is None
            continue
        assert len(saved["own"]) == expected[0]
        assert saved["own"].shape[1] >= expected[1]
        assert not torch.equal(*saved["own"]), "each rank has its own"


@pytest.mark.parametrize("mode", MODES)
def test_time_of_communication_is_on_tensorboard(trained, mode):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(trained[0] / mode))
    events.Reload()
    shares = {
        part: [point.value for point in events.Scalars(f"time/{part}")] for part in ("data", "compute", "communication")
    }
    assert [sum(step) for step in zip(*shares.values(), strict=True)] == pytest.approx([1] * 6, abs=1e-5)
    if mode == "local-sgd":  # averages after steps 3 and 6
        waits = shares["communication"]
        assert min(waits[2], waits[5]) > max(waits[1], waits[3], waits[4])


def times(movement: float, updates: float = 0.0, **exposed: float) -> Times:
    return Times(movement, compute=1.0, exposed=exposed, updates=updates)


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        (times(0.1, allreduce=0.04, bf16=0.02, int8=0.02), Choice("allreduce", 8)),
        (times(0.3, allreduce=0.2, bf16=0.04, int8=0.04), Choice("bf16", 8)),
        (times(0.3, allreduce=0.2, bf16=0.1, int8=0.04), Choice("int8", 8)),
        (times(0.45, allreduce=0.9, bf16=0.45, int8=0.25), Choice("local-sgd", 4)),
        (times(2.0, allreduce=3.8, bf16=1.9, int8=0.9), Choice("local-sgd", 6)),
        (times(20.0, allreduce=39.0, bf16=19.0, int8=9.0), Choice("local-sgd", 8)),
        (times(0.02, updates=0.4, allreduce=0.22, bf16=0.21, int8=0.22), Choice("allreduce", 8)),
        (times(0.45, updates=0.4, allreduce=0.9, bf16=0.6, int8=0.3), Choice("int8", 8)),
    ],
)
def test_auto_takes_the_most_exact_way_that_the_wire_can_bear(times, expected):
    assert best(predict(times, 8)) == expected


def test_mean_in_bytes_is_close_keeps_zeros_and_hides_nothing():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        world = World(0, 1, 0, 1, torch.device("cpu"), "gloo", None, Heartbeats(0, 1), 60.0)
        values = torch.randn(3 * SCALE_BLOCK - 7)
        values[SCALE_BLOCK : 2 * SCALE_BLOCK] *= 1e-6  # a block of its own scale
        values[0] = 0.0
        found = mean_in_bytes(values, world)
        for piece, got in zip(values.split(SCALE_BLOCK), found.split(SCALE_BLOCK), strict=True):
            assert (got - piece).abs().max() <= 0.501 * piece.abs().max() / 127
        assert found[0] == 0.0
        assert not mean_in_bytes(torch.zeros(5), world).any()
        for odd in (torch.nan, torch.inf):
            values[-1] = odd
            missing = mean_in_bytes(values, world).isnan().tolist()
            assert missing == [False] * 2 * SCALE_BLOCK + [True] * (SCALE_BLOCK - 7)
    finally:
        torch.distributed.destroy_process_group()


class Manifest:
    fingerprint = "data"


@pytest.mark.parametrize(
    ("wanted", "saved", "ranks", "refused"),
    [
        ("auto", "bf16", 2, ""),
        ("bf16", "bf16", 2, ""),
        ("bf16", "local-sgd", 2, r"distributed\.comm local-sgd -> bf16"),
        ("bf16", "allreduce", 1, ""),
        ("auto", "powersgd", 2, "step 5 is of a run that communicates by powersgd, which this version has no more"),
    ],
)
def test_checkpoint_of_another_mode_is_refused(wanted, saved, ranks, refused):
    config = loading.load(sets=[f"distributed.comm={wanted}"])
    old = loading.load(sets=["distributed.comm=auto"]).model_dump(mode="json")
    payload = {"data": "data", "step": 5, "config": old, "world_size": ranks, "comm": {"mode": saved}}
    if not refused:
        check_resumable(config, payload, Manifest)
        return
    with pytest.raises(UserError, match=refused):
        check_resumable(config, payload, Manifest)


def test_period_that_auto_has_chosen_is_not_changed_by_naming_the_mode():
    old = loading.load().model_dump(mode="json")
    used = {"mode": "local-sgd", "every": 32}
    payload = {"data": "data", "step": 5, "config": old, "world_size": 2, "comm": used}
    check_resumable(loading.load(), payload, Manifest)
    named = ["distributed.comm=local-sgd"]
    check_resumable(loading.load(sets=[*named, "distributed.local_sgd_steps=32"]), payload, Manifest)
    with pytest.raises(UserError, match=r"distributed\.local_sgd_steps 32 -> 8"):
        check_resumable(loading.load(sets=named), payload, Manifest)
