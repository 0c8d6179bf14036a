"""Nodes with separate folders: the files that their ranks exchange, and equal bytes on all of them."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from runs import HELPERS, TINY, free_ports, run

from k8scifar.data import packed
from k8scifar.data.prepare import prepare

pytestmark = pytest.mark.slow
SHORT = ["distributed.storage=local", "epochs=1", "evaluation.tta=false", "log.tensorboard=false"]
WITHIN = [*SHORT, "checkpoint.every_steps=4", "distributed.local_sgd_steps=3"]


@pytest.fixture
def nodes(tmp_path, tiny_data):
    """``nodes(trainings)``: two ranks with separate folders; returns their exit codes and logs."""
    shutil.copytree(tiny_data, tmp_path / "data-0")
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))

    def start(*trainings: tuple[str, str, list[str]]) -> tuple[list[list[int]], str]:
        plan = [
            {"port": port, "name": name, "odd": odd, "arguments": [f"--config={tmp_path / 'tiny.yaml'}"]
             + [f"--set={value}" for value in sets]}
            for port, (name, odd, sets) in zip(free_ports(len(trainings)), trainings, strict=True)
        ]  # fmt: skip
        (tmp_path / "plan.json").write_text(json.dumps(plan))
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        done = run([*torchrun, str(HELPERS / "own_ranks.py"), str(tmp_path)])
        assert "Traceback" not in done.stderr, done.stderr
        return [json.loads((tmp_path / f"codes.{rank}").read_text()) for rank in (0, 1)], done.stderr

    return start


def checkpoints(folder: Path, rank: int, name: str) -> dict[str, bytes]:
    found = (folder / f"runs-{rank}" / name / "checkpoints").glob("*.pt")
    return {path.name: path.read_bytes() for path in sorted(found)}


def test_a_broken_transfer_goes_on_and_both_keep_the_same_bytes_or_say_so(nodes, tmp_path):
    codes, said = nodes(
        ("broken", "piece", SHORT),
        ("local-sgd", "", [*WITHIN, "distributed.comm=local-sgd"]),
        ("odd", "bit", [*WITHIN, "distributed.comm=bf16"]),
    )
    assert codes == [[5, 0, 0], [1, 0, 0]], said
    assert "could not be written (No space left on device)" in said
    assert "0.3 MB of 1.8 MB are already here; resuming" in said
    assert said.count("copying synthetic") == 2, "what has come whole comes once"
    first, second = (checkpoints(tmp_path, rank, "local-sgd") for rank in (0, 1))
    assert [name[:13] for name in first] == ["step-00000004", "step-00000006"]
    assert first == second, "also where each rank has weights and momenta of its own"
    assert said.count("the nodes have drifted apart: their checkpoints of step 4 differ") == 1
    assert said.count("the nodes have drifted apart: their checkpoints of step 6 differ") == 1


def test_a_data_set_that_another_node_gave_is_replaced_and_a_node_s_own_is_not(nodes, tmp_path):
    """Trainings that end after the data set has arrived, because the global batch is too large for it."""
    prepare(tmp_path / "data-1", "synthetic:300:100")
    ends = [*SHORT, "global_batch=700"]
    codes, said = nodes(
        ("another", "", ends), ("same", "synthetic:300:100", ends), ("none", "lost", ends),
        ("new", "synthetic:200:100", ends), ("lost", "lost on node 0", ends),
    )  # fmt: skip
    assert codes == [[2] * 5] * 2, said
    assert said.count("data-1 holds another data set (synthetic:300:100") == 2, "told on both"
    assert said.count("global_batch 700 is more than") == 8
    taken = re.findall(r"copying (\S+) from rank (.)'s node to .* \(.* MB\)(.*)", said)
    assert taken == [
        ("synthetic:300:100", "0", ""),
        ("synthetic:200:100", "0", ", replacing synthetic:300:100"),
        ("synthetic:200:100", "1", ""),
    ]
    assert packed.damage(tmp_path / "data-1", packed.read_manifest(tmp_path / "data-0")) is None
    assert len(list((tmp_path / "data-1").glob("*.npy"))) == 4
