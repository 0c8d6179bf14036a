"""A resumed run equals the uninterrupted one bit for bit, for every number of ranks, optimiser and mode.

And on another number of ranks it goes on from the mean of what the former ranks held.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from comm_ranks import cut
from runs import TINY, history, train_in_turn, weights_hash

from k8scifar.cli import main
from k8scifar.data.prepare import prepare
from k8scifar.errors import PREEMPTED
from k8scifar.exchange.layout import rows
from k8scifar.training import checkpoint, loop

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

# 12 micro-batches, which 1 to 4 ranks share equally; 5 steps an epoch. Local SGD averages after steps 3 and 5.
CONFIG = TINY | {
    "global_batch": 48,
    "micro_batch": 4,
    "resolution": [{"until": 1.0, "pixels": 8}],
    "evaluation": {"batch": 64, "tta": False},
    "checkpoint": {"every_seconds": 0, "keep": 9},
    "distributed": {"local_sgd_steps": 3, "share": "equal"},
    "log": {"tensorboard": False},
}
WITHIN, BETWEEN = 2, 5  # the steps that are resumed: within an epoch and between two averagings; between epochs


@dataclass(frozen=True)
class Case:
    """One line of the table: `places` are "one machine" or "apart" (each rank on a host)."""

    ranks: int
    places: str
    optimizer: str
    comm: str
    at: int = WITHIN

    @property
    def epochs(self) -> int:
        return 1 if self.at == WITHIN else 2

    @property
    def name(self) -> str:
        return f"{self.ranks}-{self.places}-{self.optimizer}-{self.comm}-{self.epochs}".replace(" ", "-")

    @property
    def resumed(self) -> str:
        return f"{self.name}-{self.at}"

    def trainings(self) -> list[dict]:
        """The undisturbed training and the resumed one, which saves at other steps."""
        sets = [f"optimizer.name={self.optimizer}", f"distributed.comm={self.comm}"]
        sets.append(f"epochs={self.epochs}")
        shared = {"sets": sets, "apart": self.places == "apart"}
        undisturbed = shared | {"name": self.name, "sets": [*sets, f"checkpoint.every_steps={WITHIN}"]}
        return [undisturbed, shared | {"name": self.resumed, "cut": self.name, "cut_at": self.at}]


SHORT = [
    Case(1, "one machine", "muon", "allreduce"),
    Case(3, "one machine", "sgd", "allreduce"),
    Case(3, "apart", "muon", "allreduce", BETWEEN),
    Case(3, "apart", "sgd", "auto"),  # the first process times the wire, the second does not
    Case(3, "apart", "sgd", "int8"),
    Case(3, "apart", "muon", "local-sgd"),
    Case(4, "one machine", "sgd", "allreduce"),
]
ALL = [
    Case(ranks, places, optimizer, comm, at)
    for ranks in (1, 2, 3, 4)
    for places in ("one machine", "apart")[: 2 if ranks > 1 else 1]
    for optimizer in ("sgd", "muon")
    for comm in (("allreduce", "bf16", "int8", "local-sgd", "auto") if ranks > 1 else ("allreduce",))
    for at in (WITHIN, BETWEEN)
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """240 training images."""
    folder = tmp_path_factory.mktemp("data")
    prepare(folder, "synthetic:240:60")
    return folder


@pytest.fixture(scope="module")
def trained(module_path, data):
    """``trained(case)``: (folder of the case's runs, what was said). Short cases of as many ranks train in one go."""
    done = {}

    def runs(case: Case):
        cases = [other for other in SHORT if other.ranks == case.ranks] if case in SHORT else [case]
        folder = module_path / cases[0].resumed
        if folder not in done:
            folder.mkdir()
            trainings = [training for each in cases for training in each.trainings()]
            done[folder] = train_in_turn(folder, data, trainings, case.ranks, CONFIG)
        assert done[folder].returncode == 0, done[folder].stderr
        return folder, done[folder].stderr

    return runs


def assert_exact(case: Case, folder, said: str) -> None:
    """The resumed run's weights and records are the undisturbed one's."""
    assert f"resuming from {folder / case.resumed}" in said
    assert weights_hash(folder / case.resumed) == weights_hash(folder / case.name)
    assert history(folder / case.resumed) == history(folder / case.name)
    saved = checkpoint.load(checkpoint.listed(folder / case.resumed / "checkpoints")[0])["comm"]
    assert saved["mode"] == case.comm or case.comm == "auto"


@pytest.mark.parametrize("case", SHORT, ids=lambda case: case.resumed)
def test_a_resumed_run_equals_the_uninterrupted_one(trained, case):
    assert_exact(case, *trained(case))


@pytest.mark.nightly
@pytest.mark.parametrize("case", ALL, ids=lambda case: case.resumed)
def test_a_resumed_run_equals_the_uninterrupted_one_in_every_case(trained, case):
    assert_exact(case, *trained(case))


def opened(monkeypatch, folder, name: str, data, *sets: str):
    """The state with which this process alone would go on with a run."""
    found = []

    def look(session, stop):
        found.append(session.state)
        raise loop.Preempted

    monkeypatch.setattr(loop, "train", look)
    paths = ["--config", str(folder / "tiny.yaml"), "--data-dir", str(data), "--runs-dir", str(folder)]
    arguments = [*paths, "--name", name, *(part for value in sets for part in ("--set", value))]
    assert main(["train", *arguments]) == PREEMPTED
    return found[0]


@pytest.mark.parametrize(
    "case",
    [
        Case(3, "apart", "sgd", "int8"),
        Case(3, "apart", "muon", "local-sgd"),
        pytest.param(Case(3, "apart", "muon", "int8"), marks=pytest.mark.nightly),
    ],
    ids=lambda case: case.name,
)
def test_another_number_of_ranks_goes_on_from_the_mean(trained, data, monkeypatch, capfd, case):
    ranks, optimizer, comm = case.ranks, case.optimizer, case.comm
    folder, _ = trained(case)
    cut(folder / case.name, folder / f"{case.name}-alone", WITHIN)
    saved = checkpoint.load(checkpoint.listed(folder / f"{case.name}-alone" / "checkpoints")[0])
    own = saved["comm"]["own"]
    assert len(own) == ranks and not torch.equal(own[0], own[1]), "each rank has its own"
    sets = [f"optimizer.name={optimizer}", f"distributed.comm={comm}"]
    state = opened(monkeypatch, folder, f"{case.name}-alone", data, *sets)
    said = capfd.readouterr().err
    weights = list(state.net.parameters())
    if comm == "local-sgd":
        assert f"the weights and momenta of {ranks} ranks in local SGD are averaged" in said
        momenta = [state.optimizer.state[weight]["momentum_buffer"] for weight in weights]
        found = torch.cat([tensor.detach().flatten() for tensor in momenta + weights])
        torch.testing.assert_close(found, own.mean(0), rtol=0, atol=1e-7)
        assert not torch.allclose(found, own[0], rtol=0, atol=1e-5), "not rank 0's alone"
        return
    assert f"the next step adds what int8 had rounded off on {ranks} ranks" in said
    matrices = (
        state.optimizer.hidden
        if optimizer == "muon"
        else [weight for weight in weights if weight.ndim > 1 and weight.numel() >= 2**14]
    )
    expected = own.float().mean(0)
    if optimizer == "sgd":  # there the means are rounded, too, on their way back
        expected += torch.cat([rest.float().flatten() for rest in saved["comm"]["shared"]])
    gradients = torch.cat([rows(weight.grad).flatten() for weight in matrices])
    assert gradients.any()
    torch.testing.assert_close(gradients, expected, rtol=1e-5, atol=1e-9)
    names = {parameter: name for name, parameter in state.net.named_parameters()}
    if optimizer == "muon":  # what the owners rounded off the directions
        lr = state.optimizer.param_groups[-1]["lr"]
        for weight, rest in zip(matrices, saved["comm"]["shared"], strict=True):
            moved = (weight - saved["model"][names[weight]]).movedim(1, -1).flatten(1)
            torch.testing.assert_close(moved, -lr * rest.float(), rtol=1e-2, atol=1e-7)
