"""On 2 to 4 hosts a run whose pods all stop within an epoch and start again equals the undisturbed one bit for bit."""

from __future__ import annotations

import hosts
import pytest
import yaml
from comm_ranks import cut
from pods import Group, names
from runs import TINY, history, weights_hash

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
STOP = 3  # of the 5 steps of the first epoch; between two averagings of local SGD
CONFIG = TINY | {
    "global_batch": 120,
    "resolution": [{"until": 1.0, "pixels": 8}],
    "evaluation": {"tta": False},
    "checkpoint": {"every_steps": STOP, "keep": 99},
    "log": {"every_seconds": 0.001, "tensorboard": False},
}
# hosts, optimizer, comm
CASES = [
    (2, "sgd", "auto"),
    (2, "sgd", "allreduce"),
    (2, "sgd", "bf16"),
    (2, "sgd", "int8"),
    (2, "sgd", "local-sgd"),
    (2, "muon", "auto"),
    (2, "muon", "allreduce"),
    (2, "muon", "bf16"),
    (2, "muon", "int8"),
    (2, "muon", "local-sgd"),
    (3, "sgd", "auto"),
    (3, "sgd", "allreduce"),
    (3, "sgd", "bf16"),
    (3, "sgd", "int8"),
    (3, "sgd", "local-sgd"),
    (3, "muon", "auto"),
    (3, "muon", "allreduce"),
    (3, "muon", "bf16"),
    (3, "muon", "int8"),
    (3, "muon", "local-sgd"),
    (4, "sgd", "auto"),
    (4, "sgd", "allreduce"),
    (4, "sgd", "bf16"),
    (4, "sgd", "int8"),
    (4, "sgd", "local-sgd"),
    (4, "muon", "auto"),
    (4, "muon", "allreduce"),
    (4, "muon", "bf16"),
    (4, "muon", "int8"),
    (4, "muon", "local-sgd"),
]
SHORT = (3, "sgd", "auto")  # the others are nightly


def trained(group: Group) -> Group:
    """The group once its training has ended and its pods are stopped."""
    try:
        for rank in range(len(group.machines)):
            group.start(rank)
        group.until(lambda: group.done, 250, "the end")
    finally:
        group.stop()
    return group


@pytest.mark.parametrize(
    "count, optimizer, comm", [pytest.param(*case, marks=[pytest.mark.nightly] * (case != SHORT)) for case in CASES]
)
def test_a_stopped_run_equals_the_undisturbed_one(tmp_path, tiny_data, count, optimizer, comm):
    """The undisturbed run's folder without what it wrote after step STOP is what all pods killed then would leave.

    So `auto` has chosen once for both: the first processes time the wire, the second ones keep what they chose.
    """
    config = CONFIG | {
        "micro_batch": CONFIG["global_batch"] // count,  # one a host, which measured speeds can't divide otherwise
        "optimizer": {"name": optimizer, "lr": 0.02},
        "distributed": {"comm": comm, "local_sgd_steps": 2},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    with hosts.several(names(count)) as machines:
        parts = machines, tmp_path, tmp_path / "config.yaml", tiny_data
        undisturbed = trained(Group(*parts, "undisturbed"))
        cut(undisturbed.run_dir, tmp_path / "runs" / "resumed", STOP)
        resumed = trained(Group(*parts, "resumed"))
    assert undisturbed.resumed == [] and [step for _, step in resumed.resumed] == [STOP]
    for group, times in ((undisturbed, int(comm == "auto")), (resumed, 0)):
        assert group.pods[0].text().count("predicted seconds a step") == times, "how often the wire was timed"
    assert weights_hash(resumed.run_dir) == weights_hash(undisturbed.run_dir)
    assert history(resumed.run_dir) == history(undisturbed.run_dir)
