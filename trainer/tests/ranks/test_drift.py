"""Unlike processors in one training: replicas that drift are found out, told, and made equal again."""

from __future__ import annotations

import json
import re
import sys

import pytest
import torch
from runs import HELPERS, run

from k8scifar.training.state import State

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("sets", "capabilities", "drifts"),
    [
        (["optimizer.name=sgd"], ("avx2", "default"), True),
        (["optimizer.name=sgd"], ("avx2", "avx2"), False),
    ],
)
def test_replicas_are_made_equal_at_the_end_of_an_epoch(tiny_config, tiny_data, tmp_path, sets, capabilities, drifts):
    if "AVX2" not in torch.backends.cpu.get_cpu_capability() and "AVX512" not in torch.__config__.show():
        pytest.skip("needs a processor with AVX2")
    environments = json.dumps([{"ATEN_CPU_CAPABILITY": name} for name in capabilities])
    paths = ["--config", tiny_config, "--data-dir", tiny_data, "--runs-dir", tmp_path, "--name", "run"]
    options = [part for value in [*sets, "log.tensorboard=false"] for part in ("--set", value)]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    script = HELPERS / "unlike_ranks.py"
    done = run([*map(str, [*torchrun, script, tmp_path / "notes", environments, *paths, *options])])
    assert done.returncode == 0, done.stderr
    ranks = [(tmp_path / f"notes.{rank}").read_text().splitlines() for rank in range(2)]
    before, after = ([[line for line in lines if line.startswith(label)] for lines in ranks]
                     for label in ("before", "after"))  # fmt: skip
    assert len(after[0]) == 2
    assert after[0] == after[1]
    assert (before[0] == before[1]) == (not drifts)
    told = re.findall(r"the weights of rank 1 had drifted from rank 0's by step 6", done.stderr)
    assert len(told) == int(drifts), "once in a run"


def test_digest_sees_one_bit_and_not_the_order(resnet18):
    state = State.__new__(State)
    state.net, state.first_bad = resnet18, torch.zeros((), dtype=torch.int64)
    state.exchange = type("Exchange", (), {"equal": True, "equal_steps": False})
    digest = state.digest()
    assert 0 < digest.item() < 2**52
    weight = resnet18.layer1[0].conv1.weight.detach()
    bits = weight.view(torch.int32)
    bits[0, 0, 0, 0] += 1
    bits[0, 0, 0, 1] -= 1
    assert state.digest() != digest
    bits[0, 0, 0, 0] -= 1
    bits[0, 0, 0, 1] += 1
    assert state.digest() == digest
    bits[0, 0, 0, 2] ^= 1
    assert state.digest() != digest, "the last bit alone"
    bits[0, 0, 0, 2] ^= 1
