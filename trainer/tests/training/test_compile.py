"""hardware.compile: the same training, a graph a resolution, and one line where the machine can't compile.

Shows the graphs that Dynamo traces and their losses, by a backend that compiles nothing; not that Inductor's code
computes the same, which test_gpu.py asks on a GPU.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
from runs import HELPERS, history, run

from k8scifar.config import loading
from k8scifar.errors import RankError
from k8scifar.training import compiling

SETS = ["micro_batch=25", "epochs=1", "evaluation.tta=false", "log.tensorboard=false", "hardware.device=cpu"]


@pytest.mark.slow
def test_two_ranks_of_two_micro_batches_train_alike_compiled_in_a_graph_a_resolution(tiny_config, tiny_data, tmp_path):
    script, records = str(HELPERS / "compile_ranks.py"), {}
    for name in ("plain", "compiled"):
        paths = ["--config", tiny_config, "--data-dir", tiny_data, "--runs-dir", tmp_path, "--name", name]
        sets = [part for value in [*SETS, f"hardware.compile={name == 'compiled'}"] for part in ("--set", value)]
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        command = [*torchrun, script, tmp_path / f"{name}.graphs", *paths, *sets]
        done = run([*map(str, command)], env={"K8SCIFAR_COMPILE_BACKEND": "aot_eager"})
        assert done.returncode == 0, done.stderr
        assert "Warning" not in done.stderr
        assert (", compiled," in done.stderr) == (name == "compiled")
        (records[name],) = history(tmp_path / name)
        graphs = [int((tmp_path / f"{name}.graphs.{rank}").read_text()) for rank in range(2)]
        assert graphs == ([2, 2] if name == "compiled" else [0, 0]), "8 and 12 pixels; not one a micro-batch"
    for key in ("train_loss", "test_loss"):
        assert records["compiled"][key] == pytest.approx(records["plain"][key], rel=1e-4)


@pytest.mark.parametrize(
    ("device", "there", "environment", "lacks"),
    [
        ("cuda", {}, {}, r"a C compiler \(cc, gcc, clang, or what CC names\)"),
        ("cuda", {"gcc"}, {"CC": "/opt/none/cc"}, "a C compiler"),
        ("cpu", {"cc", "gcc"}, {}, r"a C\+\+ compiler \(g\+\+"),
        ("cpu", {"g++"}, {}, ""),
        ("cpu", {"/opt/c++"}, {"CXX": "/opt/c++"}, ""),
    ],
)
def test_missing_compiler_is_told_before_the_first_step(device, there, environment, lacks, monkeypatch):
    for name in ("CC", "CXX", "K8SCIFAR_COMPILE_BACKEND"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    config = loading.load(sets=["hardware.compile=true"])
    which = {name: name for name in there}.get
    if not lacks:
        monkeypatch.setattr(Path, "exists", lambda path: True)
        compiling.check(config, torch.device(device), which)
        return
    with pytest.raises(RankError, match=lacks) as told:
        compiling.check(config, torch.device(device), which)
    assert "set hardware.compile=false" in str(told.value)
    compiling.check(loading.load(), torch.device(device), which)


@pytest.mark.slow
def test_missing_compiler_ends_a_training_with_one_line(train, tmp_path):
    done = train(1, "--set", "hardware.compile=true", "--set", "hardware.device=cpu", env={"CXX": str(tmp_path / "c")})
    lines = [line for line in done.stderr.splitlines() if "k8scifar: error" in line]
    assert len(lines) == 1
    assert re.search(r"hardware.compile=true needs a C\+\+ compiler .*set hardware.compile=false", lines[0])
    assert "step " not in done.stderr
