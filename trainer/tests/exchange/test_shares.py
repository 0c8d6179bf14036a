"""Unequal shares of micro-batches: the division, unchanged mathematics, and resumes bit for bit."""

from __future__ import annotations

import json
import re
import types

import pytest
import torch
from runs import CUT_AT, history, train_in_turn, weights_hash

from k8scifar.config import loading
from k8scifar.exchange import cost_model, shares
from k8scifar.exchange.cost_model import Choice, Speeds, Times
from k8scifar.exchange.shares import Shares
from k8scifar.results import report, speedup
from k8scifar.training import checkpoint, rank_speeds

SETS = ["epochs=1", "evaluation.tta=false", "checkpoint.keep=9", "micro_batch=25", "log.tensorboard=false"]
SETS += ["optimizer.lr=0.001", f"checkpoint.every_steps={CUT_AT}"]
TWICE = [2.0, 4.0]  # seconds of a micro-batch: rank 1 takes twice as long


@pytest.fixture(scope="module")
def trained(module_path, tiny_data):
    """Four micro-batches as 2 + 2 and as 3 + 1, in several modes, and resumed: (folder, log)."""
    sgd = [*SETS, "distributed.comm=allreduce", "epochs=2"]
    muon = [*SETS, "distributed.comm=allreduce", "optimizer.name=muon"]
    trainings = [
        {"name": "sgd", "sets": [*sgd, "distributed.share=equal"], "speeds": TWICE},
        {"name": "sgd-divided", "sets": sgd, "speeds": TWICE, "later": [[9.0, 3.0]]},
        {"name": "sgd-resumed", "sets": sgd, "cut": "sgd-divided", "cut_at": 8, "speeds": [1.0, 1.0]},
        {"name": "muon", "sets": [*muon, "distributed.share=equal"], "speeds": TWICE},
        {"name": "muon-divided", "sets": muon, "speeds": TWICE},
        {"name": "muon-resumed", "sets": muon, "cut": "muon-divided", "speeds": [1.0, 1.0]},
        {"name": "bf16-divided", "sets": [*SETS, "distributed.comm=bf16"], "speeds": TWICE},
        {"name": "local-sgd", "sets": [*SETS, "distributed.comm=local-sgd"], "speeds": TWICE},
    ]
    done = train_in_turn(module_path, tiny_data, trainings)
    assert done.returncode == 0, done.stderr
    return module_path, done.stderr


def saved(folder, step):
    (path,) = (folder / "checkpoints").glob(f"step-{step:08d}-*.pt")
    return checkpoint.load(path)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["sgd", "muon"])
def test_unequal_shares_train_the_same(trained, mode):
    """Gradients of a step agree to a millionth; losses over an epoch as between world sizes (test_train.py)."""
    folder, _ = trained
    equal, unequal = (torch.load(folder / f"{name}.gradients") for name in (mode, f"{mode}-divided"))
    assert (equal - unequal).norm() < 1e-6 * equal.norm(), "passes of unlike length round unlike"
    assert saved(folder / mode, CUT_AT)["share"]["counts"] == [2, 2]
    assert saved(folder / f"{mode}-divided", CUT_AT)["share"]["counts"] == [3, 1]
    assert weights_hash(folder / f"{mode}-divided") != weights_hash(folder / mode), "other sums, other rounding"
    one, other = history(folder / mode)[0], history(folder / f"{mode}-divided")[0]
    assert other["train_loss"] == pytest.approx(one["train_loss"], rel=2e-4)
    assert other["test_loss"] == pytest.approx(one["test_loss"], rel=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["sgd", "muon"])
def test_resume_with_unequal_shares_is_bit_for_bit(trained, mode):
    folder, _ = trained
    assert weights_hash(folder / f"{mode}-resumed") == weights_hash(folder / f"{mode}-divided")
    assert history(folder / f"{mode}-resumed") == history(folder / f"{mode}-divided")


@pytest.mark.slow
def test_bf16_takes_unequal_shares(trained):
    """The first step's gradients equal all-reduce's; a wrong weight of a rank would change them."""
    folder, _ = trained
    assert saved(folder / "bf16-divided", CUT_AT)["share"]["counts"] == [3, 1]
    exact, rounded = (torch.load(folder / f"{name}.gradients") for name in ("sgd", "bf16-divided"))
    assert (exact - rounded).norm() < 1e-2 * exact.norm()


@pytest.mark.slow
def test_running_statistics_count_micro_batches_alike(trained):
    """They equal those of equal shares; compared in the first layer, where rounding is least."""
    equal, unequal = (saved(trained[0] / name, CUT_AT)["model"] for name in ("sgd", "sgd-divided"))
    for name in ("bn1.running_mean", "bn1.running_var"):
        torch.testing.assert_close(unequal[name], equal[name], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_shares_follow_speeds_that_change_and_the_log_says_so(trained):
    folder, said = trained
    divided = "node 0 computes 3 of 4 micro-batches and node 1 computes 1"
    equal = "each of 2 nodes computes 2 of 4 micro-batches"
    seconds = r"\(4 and 2 s a micro-batch\): [\d.]+ s a step \(2 \+ 2: [\d.]+ s\)"
    assert re.search(rf"{divided}, because node 1 is 2.0 times slower than node 0 {seconds}", said)
    assert f"{divided}, as in the checkpoint" in said
    assert f"{equal}, because distributed.share=equal; node 1 is 2.0 times slower" in said
    assert f"{equal}, because local SGD needs equal shares" in said
    later = "from step 6 on, node 0 computes 1 of 4 micro-batches and node 1 computes 3"
    assert f"{later}, because node 0 is 3.0 times slower than node 1" in said
    assert saved(folder / "sgd-divided", 8)["share"]["counts"] == [1, 3]


@pytest.mark.slow
def test_what_the_machines_came_to_is_in_log_summary_and_report(trained):
    folder, said = trained
    assert re.search(r"two machines trained \d+\.\d times as fast as the faster one alone: \d+ and \d+ images/s", said)
    machines = json.loads((folder / "muon-divided" / "summary.json").read_text())["machines"]
    assert machines["shares"] == [3, 1] and machines["pixels"] == 8
    assert machines["alone"][0] > 1.5 * machines["alone"][1], "25 images in 2 and in 4 s, and Muon's directions"
    assert 0 < machines["network"] < 1
    page = (folder / "muon-divided" / "report.html").read_text()
    assert speedup.sentence(machines)[1:] in page
    assert "node 1 alone" in page


@pytest.mark.parametrize(
    ("micro_batches", "seconds", "counts"),
    [
        (4, [1.0, 2.0], [3, 1]),
        (4, [2.0, 1.0], [1, 3]),
        (4, [1.0, 1.2], [2, 2]),  # 3 + 1 would be slower
        (10, [1.0, 1.5], [6, 4]),
        (10, [1.0, 1.25], [5, 5]),  # 6 + 4 would be a twentieth faster: noise
        (2, [1.0, 5.0], [1, 1]),
        (4, [1.0, 1.0, 1.0], [2, 1, 1]),
        (4, [1.0, 1.0, 0.45], [1, 1, 2]),
        (8, [1.0, 100.0], [7, 1]),
        (7, [1.0], [7]),
    ],
)
def test_division_that_suits_the_speeds(micro_batches, seconds, counts):
    speeds = Speeds(seconds, [0.0] * len(seconds), 8)
    assert cost_model.better(shares.equal(micro_batches, len(seconds)), speeds) == counts


def every_division(micro_batches, ranks):
    """All lists of `ranks` numbers from 1 on with this sum."""
    if ranks == 1:
        return [[micro_batches]]
    firsts = range(1, micro_batches - ranks + 2)
    return [[first, *rest] for first in firsts for rest in every_division(micro_batches - first, ranks - 1)]


@pytest.mark.parametrize("ranks", [2, 3])
def test_no_other_division_makes_a_shorter_step(ranks):
    """With the time of the plain step, which does not depend on the share."""
    torch.manual_seed(0)
    for _ in range(40):
        own, updates, rest = ((torch.rand(ranks) + 0.2).tolist() for _ in range(3))
        speeds = Speeds(own, [2 * each for each in updates], 8, rest)
        found = cost_model.divide_shares(7, speeds)
        least = min(map(speeds.step, every_division(7, ranks)))
        assert speeds.step(found) == pytest.approx(least)
        assert speeds.least(7) <= least * 1.5


def test_a_step_is_the_last_rank_s_micro_batches_and_then_the_directions():
    speeds = Speeds([1.0, 2.4], [2.0, 4.0], 8, [0.25, 0.5])  # and as much again for the exchange
    assert speeds.step([4, 2]) == pytest.approx(2 * 2.4 + 1.0 + 4 / 3)
    assert speeds.step([5, 1]) == pytest.approx(5.5 + 4 / 3) and cost_model.divide_shares(6, speeds) == [5, 1]
    assert cost_model.divide_shares(6, Speeds([1.0, 2.0], [2.0, 4.0], 8, [0.25, 0.5])) == [4, 2]
    assert Speeds([1.0, 2.0], [0.0, 0.0], 8).step([3, 1]) == 3.0


def test_a_checkpoint_that_does_not_say_what_no_rank_is_spared_is_taken_over():
    speeds = {"micro_batch": [1.0, 2.0], "updates": [1.0, 2.0], "pixels": 8}
    former = Shares.from_saved({"counts": [3, 1], "speeds": speeds}, 4, 2)
    assert former.speeds.busy(former.counts) == [3.0, 2.0]


def test_more_ranks_than_micro_batches_are_refused():
    with pytest.raises(ValueError, match="3 ranks can't share 2 micro-batches"):
        cost_model.divide_shares(2, Speeds([1.0] * 3, [0.0] * 3, 8))


def test_equal_shares_weigh_exactly_one():
    """So that runs with equal shares keep the bits of releases without shares."""
    for micro_batches, ranks in ((2, 2), (6, 3), (21, 7), (12, 4)):
        divided = Shares(shares.equal(micro_batches, ranks))
        assert divided.mean == micro_batches // ranks
        assert [divided.weight(rank) for rank in range(ranks)] == [1.0] * ranks
    unequal = Shares([3, 1])
    assert [unequal.weight(rank) for rank in (0, 1)] == [1.5, 0.5]


def chosen(sets, seconds, kept=None, mode="allreduce", local_size=1, timed=None):
    world = types.SimpleNamespace(size=len(seconds), local_size=local_size, rank=0)
    measured = Speeds(seconds, [0.0] * len(seconds), 8)
    timed = timed or (lambda divided: measured.step(divided.counts))
    return shares.choose_shares(loading.load(sets=sets), world, kept, mode, lambda: measured, timed)


def test_whole_steps_decide_between_the_promised_division_and_the_one_beside_it():
    six = ["global_batch=60", "micro_batch=10"]
    assert cost_model.neighbour([4, 2], Speeds([1.0, 2.2], [0.0] * 2, 8)) == [5, 1], "rank 1 is done last"
    assert cost_model.neighbour([5, 1], Speeds([1.0, 2.2], [0.0] * 2, 8)) == [4, 2]
    assert cost_model.neighbour([2, 1, 3], Speeds([1.0, 2.5, 1.0], [0.0] * 3, 8)) == [3, 1, 2]
    assert cost_model.neighbour([5, 1], Speeds([1.0, 9.0], [0.0] * 2, 8)) is None
    seconds = {(4, 2): 0.787, (5, 1): 0.702}  # measured: the exchange costs the slow rank more than was promised
    asked = []

    def timed(divided):
        asked.append(divided.counts)
        return seconds[tuple(divided.counts)]

    found, said = chosen(six, [1.0, 2.2], timed=timed)
    assert found.counts == [5, 1] and asked == [[4, 2], [5, 1]]
    assert said == (
        "node 0 computes 5 of 6 micro-batches and node 1 computes 1, because node 1 is 2.2 times slower than node 0 "
        "(2.2 and 1 s a micro-batch): 0.70 s a step (4 + 2: 0.79 s)"
    )
    seconds[5, 1] = 0.9
    assert chosen(six, [1.0, 2.2], timed=timed)[0].counts == [4, 2]
    asked.clear()
    assert chosen(six, [1.0, 1.05], timed=timed)[0].counts == [3, 3] and not asked, "no trial among equals"
    assert chosen(six, [1.0, 2.2], Shares([4, 2]), timed=timed)[0].counts == [4, 2] and not asked, "nor when resumed"


def test_what_is_said_and_what_is_not():
    four = ["global_batch=100", "micro_batch=25"]
    assert chosen(four, [1.0, 2.0], local_size=2) == (Shares([2, 2]), ""), "one machine: neither measured nor told"
    said = chosen(four, [1.0] * 3, local_size=3)[1]
    assert said == (
        "rank 0 computes 2 of 4 micro-batches, rank 1 computes 1 and rank 2 computes 1, "
        "because all ranks are on one machine"
    )
    found, said = chosen(["global_batch=100", "micro_batch=50"], [1.0, 2.0])
    assert found.counts == [1, 1] and "a smaller micro_batch would let the faster node take more" in said
    assert "smaller" not in chosen(four, [1.0, 1.05])[1]
    assert chosen(four, [1.0, 1.0], Shares([3, 1]))[0].counts == [3, 1]
    assert chosen([*four, "distributed.share=equal"], [1.0, 1.0], Shares([3, 1]))[0].counts == [2, 2]
    assert chosen(four, [1.0, 1.0], Shares([6, 4]))[0].counts == [2, 2], "another micro_batch"
    assert chosen(four, [1.0, 2.0], Shares([3, 1]), mode="local-sgd")[0].counts == [2, 2]
    assert chosen(four, [1.0, 2.0], Shares([3, 1]), local_size=2)[0].counts == [2, 2], "now on one machine"


def test_ranks_of_one_machine_share_its_speed():
    nodes = [[0, 1], [2, 3]]
    assert Speeds([1.0, 1.0, 2.0, 2.0], [0.0] * 4, 8).alone(nodes, 4, 100) == [50.0, 25.0]
    assert Speeds([1.0, 2.0], [1.0, 2.0], 8).alone([[0], [1]], 4, 100) == [20.0, 10.0], "Muon's directions included"
    plain = Speeds([1.0, 2.0], [0.0, 0.0], 8, [1.0, 2.0])
    assert plain.alone([[0], [1]], 4, 100) == [20.0, 10.0], "a plain step included, and no exchange"


class Clock:
    """A step clock of ranks that compute and then wait: `total` after each further step of a resolution."""

    def __init__(self) -> None:
        self.steps = {8: 0, 12: 0}

    def total(self):
        seconds = {"data": 1.0, "compute": 2.0, "updates": 4.0, "communication": 8.0, "between steps": 16.0}
        return {part: each * (self.steps[8] + 100 * self.steps[12]) for part, each in seconds.items()}


def test_an_epoch_s_clocks_are_read_by_resolution_without_the_first_step(monkeypatch):
    clock, world = Clock(), types.SimpleNamespace(size=2, local_size=1)
    monkeypatch.setattr(rank_speeds, "gather", lambda spent, world: torch.stack([spent, 2 * spent]))
    counting = rank_speeds.Meter(clock, world, running=True)
    for pixels in (8, 8, 8, 12):
        counting.begin(pixels)
        clock.steps[pixels] += 1
    found = counting.read()
    assert {pixels: steps for pixels, (steps, _) in found.items()} == {8: 2, 12: 1}
    assert found[8][1].tolist() == [[2.0, 4.0, 8.0, 16.0, 32.0], [4.0, 8.0, 16.0, 32.0, 64.0]]
    assert counting.read() == {}
    counting.begin(8)
    clock.steps[8] += 1
    assert [(pixels, steps) for pixels, (steps, _) in counting.read().items()] == [(8, 1)], "none at 12 pixels since"
    divided = Shares([3, 1], Speeds([1.0, 4.0], [0.0, 0.0], 8))
    assert rank_speeds.own_seconds({8: found[8]}, divided) == [1.0, 6.0], (
        "(2 + 4) s of 2 steps, three micro-batches and one"
    )
    speed = rank_speeds.speed(found, divided, world, 100)
    assert speed["alone"] == [25.0, 6.2] and speed["shares"] == [3, 1]
    assert speed["together"] == round(200 / 62, 1) and speed["network"] == round(16 / 62, 4)
    assert rank_speeds.speed({12: found[12]}, divided, world, 100) is None, "measured alone at another resolution"
    now = Speeds([1.0, 4.0], [2.0, 4.0], 8, [0.5, 1.0]).now([4.0, 2.0])
    assert now.micro_batch == [8.0, 4.0], "the fastest as fast as it was when alone"
    assert now.updates == [16.0, 4.0] and now.rest == [4.0, 1.0], "and the other eight times as slow in all"


def test_auto_communication_counts_with_shares_that_suit_the_speeds():
    exposed = {"allreduce": 0.4, "bf16": 0.15, "int8": 0.15}
    slow_wire = Times(movement=0.5, compute=4.0, exposed=exposed)
    assert cost_model.best(cost_model.predict(slow_wire, 8)) == Choice("bf16", 8)
    divided = Times(movement=0.5, compute=8.0, exposed=exposed, divided=4.0)
    steps = cost_model.predict(divided, 8)
    assert steps[Choice("local-sgd", 8)] > 8.0 > steps[Choice("allreduce", 8)]


def test_a_run_on_one_machine_says_nothing_of_machines(tmp_path):
    assert speedup.gathered([{"epoch": 1}, {"epoch": 2}]) is None
    assert report._machines({}) is None


def test_the_sentence():
    speed = {"pixels": 16, "alone": [115.2, 98.1], "together": 207.0, "network": 0.041, "shares": [1, 1]}
    assert speedup.sentence(speed) == (
        "two machines trained 1.8 times as fast as the faster one alone: 115 and 98 images/s alone, 207 together; "
        "4 % of the time waiting for the network (at 16 pixels)"
    )
    former = {"pixels": 16, "alone": [115.2], "together": 1.0, "network": 0.5, "shares": [2]}
    history = [{"speed": former}, {}, {"speed": speed}, {"speed": speed | {"together": 209.0}}]
    assert speedup.gathered(history) == speed | {"together": 208.0}, "of the machines there were at the end"
